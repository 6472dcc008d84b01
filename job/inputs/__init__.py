"""Models, datasets and templates brought to this disk, from S3, a hub or a folder; and what exactly was read.

Knows places, not contents.
"""
