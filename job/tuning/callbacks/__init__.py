"""What happens at the events of the training loop: progress, evaluations, save points.

Decides when; `job.stages.train` says what happens then.
"""
