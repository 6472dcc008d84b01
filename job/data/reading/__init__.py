"""Files to examples: JSON, CSV and Parquet, the formats of rows, messages, renamed columns.

Knows nothing of templates or tokens.
"""
