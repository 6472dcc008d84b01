"""The process that tries inputs: it has little memory, and says in lines of JSON what it found.

`python -m tests.fuzz.child <work> <findings>` tries each kept finding again (`again`, with the fault that it shows, if
any), then looks for others (`found`, and `tried` after each target). Before each input it writes it to
`<work>/current`, so that whoever started it knows what was tried when it died.
"""

import argparse
import contextlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

from tests.fuzz import harness
from tests.fuzz.harness import Input, Target, UnexpectedError, check
from tests.fuzz.targets import targets

MEMORY = 3 << 30
"""Address space beyond what the process has when everything is imported."""
DEADLY = ("died-", "hang")
"""Origins of findings that end the process: they are not tried again."""


def main(asked: argparse.Namespace) -> None:
    """Try the findings, and then every target that is asked for."""
    say = _voice()
    harness.quiet()
    chosen = {name: target for name, target in targets().items() if not asked.target or name in asked.target}
    _limit_memory()
    known = set()
    for path, name, origin, data in (*harness.kept(asked.findings), *harness.kept(asked.findings / harness.OPEN)):
        if name in chosen and not origin.startswith(DEADLY):
            shown = _origin(chosen[name], data, asked.work)
            known |= {shown} - {""}
            say(again=path.relative_to(asked.findings).as_posix(), origin=shown)
    for name, target in chosen.items():
        for origin, data in _search(target, asked, known).items():
            known.add(origin)
            say(found=harness.keep(asked.work, name, origin, data).name, target=name, origin=origin)
        say(tried=name)


def _voice() -> Callable[..., object]:
    """Prints a line of JSON; what libraries print goes nowhere."""
    real = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return lambda **facts: os.write(real, json.dumps(facts).encode() + b"\n")


def _limit_memory() -> None:
    """From here on more is a `MemoryError`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _origin(target: Target, data: bytes, work: Path) -> str:
    """The fault that an input shows; empty if none."""
    (work / "current").write_bytes(target.name.encode() + b"\n" + data)
    try:
        check(target, data, work)
    except UnexpectedError as error:
        return error.origin
    return ""


def _search(target: Target, asked: argparse.Namespace, known: set[str]) -> dict[str, bytes]:
    """Try many inputs; the smallest of each fault that is not known, by its origin."""
    found: dict[str, bytes] = {}

    @hypothesis.seed(asked.seed)
    @settings(
        max_examples=asked.examples,
        deadline=None,
        database=None,
        derandomize=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(target.inputs.map(Input))
    def once(data: bytes) -> None:
        origin = _origin(target, data, asked.work)
        if origin and origin not in known:
            found[origin] = bytes(data)  # hypothesis ends with the smallest
            raise UnexpectedError(origin, "")

    with contextlib.suppress(UnexpectedError, hypothesis.errors.HypothesisException):
        once()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("findings", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=15)
    parser.add_argument("--target", action="append")
    main(parser.parse_args())
    os._exit(0)  # threads of servers may still be running
