"""The tokenizer with its chat template: loaded, corrected, encoding text with offsets.

Knows one text at a time; nothing of which tokens are learned.
"""
