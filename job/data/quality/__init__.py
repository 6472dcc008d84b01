"""Defects of rows: duplicates, leaks into the evaluation, secrets, garbage.

Knows texts only; nothing of tokens.
"""
