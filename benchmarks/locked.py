"""Shows an environment only those packages of the Python running this that requirements.lock names.

A machine with other packages (scikit-learn, timm, ...) imports those as well, since the libraries look for them; the
image has none of them. Versions are the machine's: those that differ from the lock's are printed. The packages are
linked, not copied; NVIDIA's libraries, which torch loads by path, come along.

    python3 -m venv --without-pip <venv>
    python3 benchmarks/locked.py <venv>/lib/python3.12/site-packages
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
BESIDE = ("nvidia", "cuda")


def plain(name: str) -> str:
    """A distribution's name as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(target: Path) -> None:
    pins = re.finditer(r"^([\w.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE)
    locked = {plain(found[1]): found[2] for found in pins}
    linked, others = [], []
    for distribution in metadata.distributions():
        name = plain(distribution.metadata["Name"])
        if name not in locked and not name.startswith(BESIDE):
            others.append(name)
            continue
        pin, has = locked.get(name), distribution.version
        linked.append(f"{name} {has}" + (f" (lock: {pin})" if pin not in (None, has) else ""))
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = target / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    print(f"linked: {', '.join(sorted(linked))}\nleft out: {', '.join(sorted(others))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
