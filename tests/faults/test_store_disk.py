"""The disk: as the output, and full."""

import hashlib
import json

import pytest

from tests.faults.harness import KILLED
from tests.faults.points import may_mount

SLOW = [["slow_steps", 0.1]]


def test_a_directory_as_output(bench, tmp_path):
    """A run into a directory resumes like one into a bucket, ends with the same adapter, and leaves no debris."""
    run_id, out = bench.name("directory"), tmp_path / "out"
    first = bench.start(run_id, output=out, hooks=SLOW)
    first.until("checkpoint_committed", step=4)
    first.kill()
    run = out / run_id
    orphan = run / "checkpoints" / "data" / "0001" / "step-000006" / ".finetune-job-0123456789abcdef.part"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"half a file")
    second = bench.start(run_id, output=out).ends(0)
    assert second.event("resumed")["resumed_step"] >= 4
    done = json.loads((run / "done.json").read_text())
    for artifact in done["artifacts"]:
        assert hashlib.sha256((run / artifact["name"]).read_bytes()).hexdigest() == artifact["sha256"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "train_progress"}
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (hashlib.sha256(adapter).hexdigest(), losses) == bench.baseline()
    assert not [path for path in out.rglob("*") if path.name.startswith(".finetune-job-")]


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a file system")
def test_the_disk_is_full_for_a_while(bench):
    """A checkpoint that does not fit on the disk is left out, with a warning; training continues."""
    run_id = bench.name("full")
    job = bench.start(run_id, hooks=[["full_disk", 4, 5], ["commit_every_save"], *SLOW]).ends(0)
    assert [line["step"] for line in job.events("checkpoint_skipped")] == [4]
    committed = [line["step"] for line in job.events("checkpoint_committed")]
    assert 4 not in committed
    assert committed[-1] == 12
    bench.check_whole(run_id)


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a file system")
def test_the_disk_fills_while_a_checkpoint_is_written(bench):
    """A checkpoint of megabytes that begins to be written and does not fit is left out as well, though its own files,
    once they are deleted, leave room: training continues."""
    run_id, left = bench.name("fills"), 3 << 20  # the adapter fits, the optimizer's state does not
    job = bench.start(run_id, lora_r=256, hooks=[["full_disk", 4, 5, left], ["commit_every_save"], *SLOW]).ends(0)
    assert [line["step"] for line in job.events("checkpoint_skipped")] == [4]
    assert [line["step"] for line in job.events("checkpoint_committed")][-1] == 12


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a file system")
def test_lost_while_the_disk_is_full(bench):
    """The checkpoint before the one that did not fit is the one to continue from."""
    run_id = bench.name("full")
    bench.start(run_id, hooks=[["full_disk", 3, 12], ["kill_at_step", 7], ["slow_steps", 0.3]]).ends(KILLED)
    second = bench.start(run_id).ends(0)
    assert second.event("resumed")["resumed_step"] == 2
    bench.check_whole(run_id)
