"""The HTML page of a run or a check: its values, its charts, its tokens in colour.

Knows what a reader wants to see; decides nothing about the run.
"""
