"""S3 and compatible stores: connection, failures and retries, uploads and downloads in parts, checksums.

The only place that imports boto3.
"""
