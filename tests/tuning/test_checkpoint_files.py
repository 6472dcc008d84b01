"""What the trainer wrote is read back before it is resumed from: parts that do not fit together are rejected."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from job.storage.faults import DamagedError
from job.tuning.checkpoint_files import ADAPTER, FILES, SCALER, check

BF16, FP16 = ({"step": 4, "plan": {"compute_dtype": name}} for name in ("bfloat16", "float16"))
SKIPPING = 2


@pytest.fixture
def cpu():
    """What accelerate's optimizer needs, gone afterwards."""
    Accelerator(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(directory: Path, *, scaled: bool, overflows: int = 0, fused: bool = False) -> Path:
    """Four steps as the trainer takes and writes them; of the first few, the gradients overflow."""
    directory.mkdir()
    adapter = torch.nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    plain = torch.optim.AdamW(adapter.parameters(), fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda _: 1.0)
    optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    for step in range(4):
        loss = adapter(torch.ones(1, 2)).sum() * (float("inf") if step < overflows else 1.0)
        (scaler.scale(loss) if scaler else loss).backward()
        optimizer.step()
        if not optimizer.step_was_skipped:
            scheduler.step()
        optimizer.zero_grad()
    save_file(adapter.state_dict(), directory / ADAPTER, metadata={"step": "4"})
    (directory / "adapter_config.json").write_text("{}")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save(scheduler.state_dict(), directory / "scheduler.pt")
    torch.save({"python": 0, "numpy": 0, "cpu": 0}, directory / "rng_state.pth")
    if scaler:
        torch.save(scaler.state_dict(), directory / SCALER)
    return directory


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_steps_that_the_scaler_skipped_are_not_damage(tmp_path, fused):
    """In fp16 optimizer and scheduler may lag behind the trainer, in all three ways in which they do."""
    for overflows in (0, SKIPPING, 4):
        directory = trained(tmp_path / str(overflows), scaled=True, overflows=overflows, fused=fused)
        check(directory, FP16)
        check(directory, BF16)  # resumed on another card, and not yet saved there


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("name", [*FILES, SCALER])
def test_every_part_is_needed(tmp_path, name):
    """A part that is missing, or cut short, is named; the scaler is a part where the plan says fp16."""
    directory = trained(tmp_path / "made", scaled=True)
    whole = (directory / name).read_bytes()
    (directory / name).unlink()
    with pytest.raises(DamagedError, match=f"it lacks {name}"):
        check(directory, FP16)
    if name != "adapter_config.json":  # nothing in it is read here
        (directory / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DamagedError, match="it cannot be read"):
            check(directory, FP16)


@pytest.mark.usefixtures("cpu")
def test_parts_of_other_steps_are_rejected(tmp_path):
    """Without a scaler nothing lags behind; with one, nothing is ahead, and the scheduler goes with one of the two."""
    bf16 = trained(tmp_path / "bf16", scaled=False)
    check(bf16, BF16)
    with pytest.raises(DamagedError, match="record 5, adapter 4, trainer 4, scheduler 4, optimizer 4"):
        check(bf16, BF16 | {"step": 5})
    with pytest.raises(DamagedError, match=r"record 3, adapter 4, trainer 4, scheduler 4, optimizer 4"):
        check(bf16, BF16 | {"step": 3})
    fp16 = trained(tmp_path / "fp16", scaled=True, overflows=SKIPPING)
    with pytest.raises(DamagedError, match=r"record 1, adapter 4, trainer 4, scheduler 2, optimizer 2"):
        check(fp16, FP16 | {"step": 1})
    scheduler = torch.load(fp16 / "scheduler.pt")
    torch.save(scheduler | {"last_epoch": 3}, fp16 / "scheduler.pt")
    with pytest.raises(DamagedError, match=r"record 4, scheduler 3$"):
        check(fp16, FP16)
    (fp16 / SCALER).unlink()
    with pytest.raises(DamagedError, match=r"record 4, scheduler 3, optimizer 2$"):
        check(fp16, BF16)
