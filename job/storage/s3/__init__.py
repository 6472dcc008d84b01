"""S3 and what speaks like it: connection, failures and retries, uploads and downloads in parts, checksums.

The only place that imports boto3.
"""
