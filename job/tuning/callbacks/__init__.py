"""What happens at the events of the training loop: the plan, progress, evaluations, save points.

Decides when; `job.tuning.hooks` says what happens then.
"""
