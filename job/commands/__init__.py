"""What a person runs besides a training: `check`, `variables`, `demo`.

Knows the stages of a run and words for a terminal; a run needs nothing of it.
"""
