"""A container's control group as the kernel shows it: files with the memory that is in use."""

from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(kw_only=True)
class ControlGroup:
    """A directory with the files of cgroup v2, or of v1."""

    directory: Path
    limit: int | str = GIB
    version: int = 2

    def show(self, in_use: float, *, files: float = 0, kills: int = 0) -> "ControlGroup":
        """Memory in GiB: what the kernel cannot take back, and what it keeps of files; and how many it killed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        usage, cached = int((in_use + files) * GIB), int(files * GIB)
        total = "total_" if self.version == 1 else ""
        texts = {
            ("memory.max", "memory.limit_in_bytes"): f"{self.limit}\n",
            ("memory.current", "memory.usage_in_bytes"): f"{usage}\n",
            ("memory.events", "memory.oom_control"): f"low 0\noom_kill {kills}\n",
            (
                "memory.stat",
                "memory.stat",
            ): f"anon {usage - cached}\n{total}active_file 0\n{total}inactive_file {cached}\n",
        }
        for names, text in texts.items():
            (self.directory / names[self.version == 1]).write_text(text)
        return self
