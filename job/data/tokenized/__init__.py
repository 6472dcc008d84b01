"""All sequences of a run on disk: the draft, the sets made of it, and what is counted on the way.

Knows token ids and labels; nothing of templates.
"""
