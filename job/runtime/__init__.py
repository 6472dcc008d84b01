"""The process and its machine: errors and exit codes, signals, GPUs, child processes, hashing, the work directory.

Knows nothing of fine-tuning; imports nothing else of this project.
"""
