"""A trained model to files that others load: the adapter, the merged weights.

Knows formats, not where the files go.
"""
