"""A trained model to files that others load: the adapter, the merged weights.

Knows formats; nothing of where the files go.
"""
