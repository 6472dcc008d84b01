"""The base model by its small files: configuration, shape, memory estimate, schedule of a run.

Loads no weights and imports no training library.
"""
