"""`python -m job demo`: a small real model, a local S3 server, one run, and what the model learned.

Knows the job only from outside, as a user does.
"""
