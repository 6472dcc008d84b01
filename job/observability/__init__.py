"""What others see of a run: log lines, metrics, the termination message, where the time went; and what is masked.

Knows nothing of what a run does.
"""
