"""The steps that `run.py` names: preflight, claim, fetch, prepare, resume, load, evaluate, train, publish.

Knows what happens in which order and what each step hands to the next (`context`); nothing of tensors, templates or
S3. `publish` decides what is published.
"""
