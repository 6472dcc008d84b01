"""Rows to tokens: reading files, judging their quality, rendering conversations, masks, truncation, datasets on disk.

Knows nothing of weights, GPUs, checkpoints or where files came from.
"""
