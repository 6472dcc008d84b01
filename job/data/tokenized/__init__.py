"""All sequences of a run on disk: the draft, the datasets made from it, and their counts.

Knows token ids and labels; nothing of templates.
"""
