"""Which tokens are learned: spans of answers in the rendered text, labels, weights, truncation.

Knows one conversation at a time; nothing of files or datasets.
"""
