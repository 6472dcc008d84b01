"""What a person runs besides a training: `check`, `env`, `variables`, `demo`.

`checks` looks and decides the order, `check` is its command line, `check_text` its words. Knows the stages of a run;
a run needs nothing of it.
"""
