"""S3 and what speaks like it: connection, uploads and downloads in parts, checksums.

`bucket` sends every request and retries it, `failures` decides which failures may be retried. The only place that
imports boto3.
"""
