"""Parquet files to rows, of which none takes more memory than it may.

Knows the format and its tables; not what a row means.
"""
