"""One interface to S3 and to directories: atomic writes, one winner of each create, retries until the timeout.

Knows nothing of runs. `job.storage.s3` is the only place that imports boto3.
"""
