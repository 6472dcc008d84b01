"""Compiled kernels and Python modules, kept between runs under `TUNE_CACHE`.

Knows keys, archives and bytecode. A run without them is slower and otherwise the same.
"""
