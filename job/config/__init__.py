"""The table of variables: their types, rules and meanings, and how `TUNE_*` becomes a `Config`.

Knows nothing of what the values are used for.
"""
