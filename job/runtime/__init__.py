"""The process and its machine: errors and exit codes, signals, GPUs, libraries, child processes, the work directory.

Knows nothing of fine-tuning; imports nothing else of this project.
"""
