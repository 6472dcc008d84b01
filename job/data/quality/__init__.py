"""What is wrong with rows: duplicates, leaks into the evaluation, secrets, garbage; and how grave it is.

Knows texts only; nothing of tokens.
"""
