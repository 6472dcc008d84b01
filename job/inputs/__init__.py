"""Models, datasets and templates -> files on this disk, from S3, a hub or a directory; and which versions were read.

Knows places, not contents.
"""
