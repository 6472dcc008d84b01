"""The training stack: the only package that imports torch, transformers, trl, peft, bitsandbytes and unsloth.

A module that imports any of them imports `job.tuning.unsloth_import` first. The others (`hooks`, `fit.plan`,
`fit.candidates`, `fit.micro_batches`) load in milliseconds.
"""
