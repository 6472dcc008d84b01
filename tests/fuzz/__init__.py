"""Random inputs for everything that reads what others wrote.

The law for each: it answers with a value or with one of the project's own errors, whose exit code fits, within bounded
time and memory; never with another exception. `python -m tests.fuzz` looks for hours, `test_fuzz.py` for seconds. What
was found once is a file in `findings/`, named `<target>--<what was found>`, and is tried at every `make test`.
"""
