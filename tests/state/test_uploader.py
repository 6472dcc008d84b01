"""Checkpoints are uploaded by a process of its own; whatever happens to it, training knows what is committed."""

import signal

import psutil
import pytest
from structlog.testing import capture_logs

from job.runtime.errors import FencedError, StorageError
from job.state import uploader as module
from job.state.checkpoints import HISTORY
from job.state.ledger import Ledger
from job.state.uploader import Saved, Setup, Uploader
from job.storage.open import open_store

pytestmark = pytest.mark.process


class Run:
    """An attempt that has fenced, and its uploader; the output is a directory."""

    def __init__(self, directory):
        self.directory = directory
        self.ledger = self.attempt(1)
        self.uploader = Uploader(
            Setup(
                uri=str(directory / "out"),
                run_id="run",
                attempt=1,
                patience_seconds=5.0,
                owner="1",
                life=0,
                conditional=True,
                last=self.ledger.fence(),
                keep=2,
                kept=[],
            )
        )

    def attempt(self, number):
        return Ledger(store=open_store(str(self.directory / "out")), run_id="run", attempt=number, owner=str(number))

    def save(self, step):
        directory = self.directory / f"staged-{step}"
        directory.mkdir()
        (directory / HISTORY).write_text("{}\n")
        saved = Saved(step=step, directory=directory, stall_seconds=0.1, facts={"fingerprint": {}, "plan": {}})
        self.uploader.submit(saved)
        return directory

    def worker(self):
        return psutil.Process(self.uploader._worker._process.pid)

    def committed(self):
        return [entry.body["step"] for entry in self.ledger.newest_first() if entry.kind == "checkpoint"]


def test_the_worker_gets_the_stores_credentials_only(tmp_path, monkeypatch):
    """The process that uploads has what S3 needs, and no other credential."""
    store = {"AWS_SECRET_ACCESS_KEY": "store", "AWS_SESSION_TOKEN": "store", "https_proxy": "http://u:store@proxy"}
    others = {"HF_TOKEN": "planted", "WANDB_API_KEY": "planted", "DB_PASSWORD_2": "planted", "DB": "pg://u:planted@h"}
    for name, value in {**store, **others, "MAX_TOKENS": "3"}.items():
        monkeypatch.setenv(name, value)
    run = Run(tmp_path)
    environment = run.worker().environ()
    run.uploader.close()
    assert {**store, "MAX_TOKENS": "3"}.items() <= environment.items()
    assert "planted" not in str(environment)


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    yield made
    made.uploader.close()


def test_checkpoints_are_committed(run):
    """Each is committed and its local files deleted; of the old ones in the output only TUNE_CHECKPOINT_KEEP stay."""
    staged = []
    for step in (1, 2, 3):
        staged.append(run.save(step))
        assert run.uploader.drain()
    assert run.committed() == [3, 2, 1]
    assert not any(directory.exists() for directory in staged)
    assert run.uploader.last == 4
    assert run.uploader.kept == [f"run/checkpoints/data/0001/step-00000{step}" for step in (2, 3)]
    assert sorted(path.name for path in run.directory.glob("out/run/checkpoints/data/0001/*")) == [
        "step-000002",
        "step-000003",
    ]


def test_of_the_pending_ones_the_newest_wins(run):
    """While an upload is in flight, a newer checkpoint takes the place of the one that waits."""
    run.worker().suspend()
    staged = [run.save(step) for step in (1, 2, 3)]
    assert [directory.exists() for directory in staged] == [True, False, True]
    assert not run.uploader.drain(0.1)
    run.worker().resume()
    assert run.uploader.drain(20)
    assert run.committed() == [3, 1]


def test_a_worker_that_dies_is_replaced(run):
    """What was in flight is sent to another process, and the deaths before a commit do not count afterwards."""
    run.worker().suspend()
    run.save(1)
    with capture_logs() as logs:
        run.worker().kill()
        assert run.uploader.drain()
    assert [line["status"] for line in logs if line["event"] == "uploader_died"] == [-signal.SIGKILL]
    assert run.committed() == [1]
    assert run.uploader._deaths == 0


def test_workers_that_die_again_and_again_end_the_run(run, monkeypatch):
    """After too many deaths without a commit, the next check raises a storage error."""
    monkeypatch.setattr(module, "Child", lambda *_, **options: _Dead())
    run.worker().suspend()
    run.save(1)
    run.worker().kill()
    with pytest.raises(StorageError, match=f"{module.MOST_DEATHS} times"):
        run.uploader.drain()
    with pytest.raises(StorageError):
        run.save(2)


class _Dead:
    """A worker that dies at once."""

    def send(self, _):
        pass

    def __iter__(self):
        return iter(())

    def wait(self):
        return -signal.SIGKILL


def test_an_attempt_that_was_replaced_hears_of_it(run):
    """The error that ended an upload is raised in the training process, of the same kind."""
    run.attempt(2).fence()
    run.save(1)
    with pytest.raises(FencedError):
        run.uploader.drain()


def test_close_ends_the_worker(run):
    """Nothing is left running."""
    worker = run.worker()
    run.save(1)
    run.uploader.drain()
    run.uploader.close()
    assert not worker.is_running()
