"""Reads files in a process of limited memory and disk; prints what became of each as a line of JSON.

`python -m tests.data.reading.bombs <file>...`
"""

import json
import resource
import signal
import sys
from pathlib import Path

MEMORY, DISK = 1 << 30, 128 << 20
"""Bytes beyond those of a process that has read a small file, and of one file."""


def read(path: Path) -> dict:
    from job.data.reading.dataset import ExampleStream, Source
    from job.runtime.errors import known

    try:
        return {"rows": sum(1 for _ in ExampleStream([Source(name=path.name, path=path)]))}
    except Exception as error:
        failure = known(error)
        if failure is None:
            raise
        return {"code": failure.exit_code, "message": failure.message, "remedy": failure.remedy}


def main(small: Path, *files: Path) -> None:
    read(small)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for file in files:
        sys.stdout.write(json.dumps({"file": file.name, **read(file)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
