"""What others see of a run: log lines, metrics, the termination message, where the time went.

`redaction` removes credentials from whatever is written; `masking` finds what looks like a secret in the data. Knows
nothing of what a run does.
"""
