"""The process that tries inputs: it has little memory, and says in one line of JSON for each what it found.

`python -m tests.fuzz.child <work> --seed N --examples N [--target NAME ...]`. Before each input it writes it to
`<work>/current`, so that whoever started it knows what was tried when it died.
"""

import argparse
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz import harness
from tests.fuzz.harness import Target, Unexpected, check, line
from tests.fuzz.targets import targets

MEMORY = 3 << 30
"""Address space beyond what the process has when everything is imported."""


def limit_memory() -> None:
    """From here on more is a `MemoryError`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def search(target: Target, work: Path, *, seed: int, examples: int, known: set[str]) -> dict[str, bytes]:
    """Try many inputs; the smallest of each kind of finding, by its origin."""
    found: dict[str, bytes] = {}

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(target.inputs)
    def once(data: bytes) -> None:
        (work / "current").write_bytes(target.name.encode() + b"\n" + data)
        try:
            check(target, data, work)
        except Unexpected as error:
            if error.origin in known:
                return
            found[error.origin] = data
            raise

    _quietly(once)
    return found


def _quietly(run: Callable[[], None]) -> None:
    try:
        run()
    except (Unexpected, hypothesis.errors.HypothesisException, BaseExceptionGroup):
        pass  # what counts is kept


def main(asked: argparse.Namespace) -> None:
    """Try every target that is asked for."""
    real = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries print
    harness.quiet()
    known: set[str] = set(asked.known or ())
    limited = False
    for name, target in targets().items():
        if asked.target and name not in asked.target:
            continue
        if not limited:
            limit_memory()
            limited = True
        for origin, data in search(target, asked.work, seed=asked.seed, examples=asked.examples, known=known).items():
            known.add(origin)
            path = asked.work / harness.file_name(name, origin, data)
            path.write_bytes(data)
            os.write(real, line(found=path.name, target=name, origin=origin, bytes=len(data)).encode() + b"\n")
        os.write(real, line(tried=name).encode() + b"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--target", action="append")
    parser.add_argument("--known", action="append")
    main(parser.parse_args())
    sys.stdout.flush()
    os._exit(0)
