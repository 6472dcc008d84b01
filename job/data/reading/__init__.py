"""Files to examples: JSON, CSV and Parquet, the formats of rows, messages.

`columns` gives a user's columns the names of the format, `fields` reads their values. Knows nothing of templates or
tokens.
"""
