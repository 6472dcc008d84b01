"""What is chosen on a card, on one that is faked: the memory that it has, and whether its kernels can be recorded."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from job.config.schema import Config
from job.model.shape import llama
from job.runtime.errors import PermanentError
from job.tuning.device import Device
from job.tuning.fit import control, search
from job.tuning.fit.candidates import Workload
from job.tuning.fit.control import PassControl
from job.tuning.fit.plan import PassConfig, make_plan
from job.tuning.fit.search import PassSearch

LENGTHS = [200, 300, 400, 500, 600, 700, 1000, 2048]
SHAPE = llama(hidden=2048, inner=8192, layers=16, keys=512, vocabulary=128_256)
CARD = Device(kind="cuda", name="card", memory_bytes=80 << 30, capability="9.0", dtype=torch.bfloat16)
GRAPHS = PassConfig(micro_batch=4, tokens_in_pass=4348, gradient_checkpointing="off", cuda_graphs=True)


class NotRecordableError(Exception):
    """In the place of that of `job.tuning.fit.attention`, which a CPU cannot import."""


class Decoder:
    """In the place of `GraphedDecoder`: each number of rows is recorded when it is first met."""

    def __init__(self, model, *, longest, rows, strictly, failed):
        if model.card.graphs == "impossible":
            raise NotRecordableError("no decoder")
        self.model, self.failed, self.recorded = model, failed, {}
        model.decoder = self

    def remove(self):
        """The decoder is itself again."""
        self.model.decoder = None

    def clear(self):
        """Nothing is recorded."""
        self.recorded.clear()


class Model(torch.nn.Module):
    """One weight; its decoder may be replaced by a recorded one."""

    def __init__(self, card):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.card, self.decoder = card, None

    def get_base_model(self):
        """Itself."""
        return self


class Trainer:
    """A trainer of which only a micro-batch is there: its loss is the number of its rows."""

    def __init__(self, card):
        self.model = self.model_wrapped = Model(card)
        self.args = SimpleNamespace(device="cpu", gradient_checkpointing=None)
        self.train_dataset = LENGTHS
        self.card = card

    def run_micro_batch(self, model, batch, _labels):
        """Runs out of memory above the card's rows; a recording that differs is half as large again."""
        rows = len(batch["labels"])
        self.card.tried.append(rows)
        if rows > self.card.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if model.decoder:
            model.decoder.recorded[rows] = True
        loss = model.weight.sum() * rows * (1.5 if model.decoder and self.card.graphs == "different" else 1)
        loss.backward()
        return loss.detach()


@pytest.fixture
def card(monkeypatch):
    """A card with room for all rows, on which everything can be recorded."""
    card = SimpleNamespace(rows=8, free=70 << 30, graphs="possible", tried=[])
    numbers = {"mem_get_info": lambda: (card.free, 80 << 30), "get_per_process_memory_fraction": lambda: 1.0}
    numbers |= dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_reserved"), lambda: 0)
    nothing = dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "get_rng_state"), lambda: None)
    for name, value in (numbers | nothing | {"set_rng_state": lambda _: None}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(search, "matrix_rate", lambda: 6e14)
    monkeypatch.setattr(control, "set_checkpointing", lambda _model, _mode: None)
    kernel = SimpleNamespace(strictly=contextlib.nullcontext)
    gpu_only = {
        "attention": SimpleNamespace(install=lambda: kernel, NotRecordableError=NotRecordableError),
        "cuda_graphs": SimpleNamespace(GraphedDecoder=Decoder),
    }
    for name, module in gpu_only.items():
        monkeypatch.setitem(sys.modules, f"job.tuning.fit.{name}", module)
    return card


def choose(card, reused=None, **changed) -> PassControl:
    """Choose on the card, and return what owns the plan."""
    config = Config(**{"model": "/m", "dataset": ("/d.jsonl",), "output": "/o", "device": "cuda", **changed})
    trainer = Trainer(card)
    plan = make_plan(config, CARD, lengths=LENGTHS, learning_rate=2e-4)
    trainer.passes = PassControl(trainer, plan, device=CARD, lengths=LENGTHS)
    PassSearch(
        trainer=trainer,
        collate=lambda rows: {"labels": torch.ones(len(rows), 2, dtype=torch.int64)},
        config=config,
        device=CARD,
        workload=Workload(lengths=LENGTHS, shape=SHAPE, state_bytes=1 << 30),
    ).choose(reused=reused)
    return trainer.passes


def test_the_quickest_that_fits(card):
    """Where there is room, that is the whole batch, recorded: run once unrecorded, once to record, once to measure."""
    passes = choose(card)
    assert passes.plan.pass_config == PassConfig(
        micro_batch=8, tokens_in_pass=sum(LENGTHS), gradient_checkpointing="off", cuda_graphs=True
    )
    assert passes.limit.tokens == sum(LENGTHS)
    assert card.tried == [8, 8, 8]
    assert passes.recorded_lengths == [8]
    assert passes.plan.reasons[-1].endswith("fits")


def test_what_ran_out_of_memory_is_not_chosen(card):
    """The next candidates are tried until one fits; each rejection is an event, and a reason of the plan."""
    card.rows = 2
    with capture_logs() as logs:
        passes = choose(card)
    rejected = [line["candidate"] for line in logs if line["event"] == "plan_candidate_rejected"]
    assert passes.plan.pass_config.micro_batch <= 2
    assert rejected
    assert len(passes.plan.reasons) == len(rejected) + 1
    assert all("out of memory" in reason for reason in passes.plan.reasons[:-1])


@pytest.mark.parametrize("graphs", ["impossible", "different"])
def test_graphs_that_do_not_work_are_tried_once(card, graphs):
    """Where the model cannot be recorded, or a replay gives another result, all other candidates are without."""
    card.graphs = graphs
    with capture_logs() as logs:
        passes = choose(card)
    assert not passes.plan.pass_config.cuda_graphs
    assert sum("CUDA graphs" in line.get("candidate", "") for line in logs if "rejected" in line["event"]) == 1
    assert passes.recorded_lengths == []


def test_nothing_fits(card):
    """The error names what needs least, all that was tried, and the settings that leave no choice."""
    card.free = 100 << 20
    with pytest.raises(PermanentError, match=r"2,048 tokens.*only 100 MiB are left") as caught:
        choose(card, micro_batch=4)
    assert caught.value.remedy.startswith("Leave TUNE_MICRO_BATCH at auto. ")


def test_what_an_earlier_attempt_used_is_not_measured(card):
    """It is put in force as it is, without the graphs that the settings rule out now."""
    assert choose(card, GRAPHS).plan.pass_config == GRAPHS
    assert not choose(card, GRAPHS, lora_dropout=0.1).plan.pass_config.cuda_graphs
    assert card.tried == []


def test_recordings_are_freed_once(card):
    """An evaluation that runs out of memory takes theirs; where there is nothing to free, it does not try again."""
    passes = choose(card)
    assert [passes.free_recordings(), passes.free_recordings(), passes.recorded_lengths] == [True, False, []]
    assert passes.plan.pass_config.cuda_graphs


def test_graphs_that_fail_in_training(card):
    """The plan in force is without them from then on."""
    passes = choose(card)
    with capture_logs() as logs:
        passes._graphs.failed("an unusual layer")
    assert not passes.plan.pass_config.cuda_graphs
    assert [(line["event"], line["reason"]) for line in logs] == [("cuda_graphs_disabled", "an unusual layer")]
