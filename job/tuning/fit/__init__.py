"""How a step is split into micro-batches on this GPU: candidates, their search, attention kernels, CUDA graphs.

Knows memory and time; changes no result beyond rounding.
"""
