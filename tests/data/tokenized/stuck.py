"""Renders rows on which a template or a tokenizer explodes; prints each error as a line of JSON.

`python -m tests.data.tokenized.stuck <folder> <case>...`; each case is a folder with a tokenizer and `rows.jsonl`.
"""

import json
import os
import sys
from pathlib import Path

from job.data.reading.dataset import ExampleStream, Source
from job.data.rendering.renderer import Renderer
from job.data.tokenized import overtime
from job.data.tokenizer.load import load_tokenizer
from job.runtime.errors import DataError
from tests.data.datasets import tokenized
from tests.tiny_tokenizer import DATE


def main(directory: Path, *cases: str) -> None:
    overtime.SECONDS = 1.0
    for case in cases:
        found = load_tokenizer(directory / case, date=DATE)
        examples = ExampleStream([Source(name="rows.jsonl", path=directory / case / "rows.jsonl")])
        try:
            tokenized(examples, renderer=Renderer(tokenizer=found), directory=directory / case / "out")
        except DataError as error:
            sys.stdout.write(json.dumps({"case": case, "message": error.message, "remedy": error.remedy}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # as the job does: a thread may be left behind


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
