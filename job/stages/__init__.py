"""The steps that `run.py` names: preflight, fetch, resume, train, evaluate, publish.

Knows what happens in which order and what each step hands to the next; nothing of tensors, templates or S3.
"""
