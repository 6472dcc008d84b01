"""TRL's SFTTrainer for this job: how it is built, a step's micro-batches, the loss, the order of rows, what is saved.

Decides neither what fits the GPU (`job.tuning.fit`) nor what happens at which step (`job.tuning.callbacks`).
"""
