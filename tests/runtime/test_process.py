"""What the process knows of its container."""

import pytest

from job.runtime import process


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", None), ("250000 100000", 2.5), ("50000 100000", 0.5), ("", None), (None, None)]
)
def test_cpu_quota(tmp_path, monkeypatch, text, cpus):
    """The container's CPU quota is read from cgroup v2."""
    monkeypatch.setattr(process, "CGROUP", tmp_path)
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert process.cpu_quota() == cpus
