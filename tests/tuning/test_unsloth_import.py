"""Unsloth rewrites the one trainer that this program uses, and leaves the others alone."""

import json
import subprocess
import sys

import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.process

REWRITES = """
import json, sys
from pathlib import Path
from job.runtime import libraries
libraries.prepare(libraries.LibrarySettings(scratch=Path(sys.argv[1]), expect_gpu=False, cpu_only=True))
from job.tuning import unsloth_import
if sys.argv[2] == "all":
    sys.meta_path[:] = [one for one in sys.meta_path if type(one).__module__ != unsloth_import.__name__]
from trl.trainer import sft_trainer
sft_trainer.SFTTrainer = sft_trainer.SFTTrainer.__mro__[1]  # as on a GPU: TRL's own, where a CPU's is in its place
from unsloth.models import rl
rl.PatchFastRL()
from trl.trainer import grpo_trainer
print(json.dumps([path.stem for path in Path(sys.argv[1], "unsloth").glob("Unsloth*.py")]))
print(sft_trainer.SFTTrainer.__module__, grpo_trainer.GRPOTrainer.__module__)
"""


@pytest.mark.parametrize("which", ["one", pytest.param("all", marks=pytest.mark.full)])
def test_only_the_trainer_in_use_is_rewritten(tmp_path, which):
    """Without the finder Unsloth rewrites GRPO's trainer and a dozen others; SFT's it rewrites either way."""
    done = subprocess.run(
        [sys.executable, "-c", REWRITES, str(tmp_path), which], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *_, names, modules = done.stdout.splitlines()
    if which == "one":
        assert json.loads(names) == ["UnslothSFTTrainer"]
        assert modules.split() == ["UnslothSFTTrainer", "trl.trainer.grpo_trainer"]
    else:
        assert {"UnslothSFTTrainer", "UnslothGRPOTrainer", "UnslothDPOTrainer"} <= set(json.loads(names))
        assert modules.split() == ["UnslothSFTTrainer", "UnslothGRPOTrainer"]
