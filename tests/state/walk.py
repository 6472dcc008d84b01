"""All interleavings of two attempts at one run, and every fault of a store: a walk through the states of an output.

The real ledger, record, checkpoint and publication code runs over a store in memory. Each attempt is a thread that
stops before every call of its store, so that a schedule decides which call happens next: an attempt may end there (a
killed process) or continue later (one that was frozen). After each call the output is looked at: whatever `done.json`
and `latest.json` say must be true, and no finished result may be lost. At the end one more attempt, alone and without
faults, must be able to finish the run.

    python -m tests.state.walk --pairs        every pair of stops of two attempts (hours)
    python -m tests.state.walk --seed 7 --runs 5000    random schedules of three attempts with random faults
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import structlog

from job.runtime.errors import ConfigError, FencedError, StorageError
from job.state import checkpoints, json_object
from job.state.attempts import Attempts
from job.state.ledger import Ledger
from job.state.publication import Publication, Published
from job.state.record import Record
from job.storage.base import Entry
from job.storage.faults import MissingError

RUN = "run"
DONE = f"{RUN}/done.json"
STEPS = 2
FAULTS = ("lose", "repeat", "delay", "truncate", "deny")
WRITES = ("create", "write", "replace", "upload", "copy")
ENDS = {0, 74, 76, 78}


class Killed(BaseException):
    """The attempt's process is gone."""


class WrongError(AssertionError):
    """An output that says what is not true."""


@dataclass
class Objects:
    """What is stored, for all attempts."""

    content: dict[str, bytes] = field(default_factory=dict)
    late: list[tuple[str, str, bytes, bytes | None]] = field(default_factory=list)
    """Requests that a network holds back, to be executed once more."""

    def execute(self, what: str, key: str, data: bytes, expected: bytes | None) -> bool:
        """A write as a server does it; returns whether its condition held."""
        there = self.content.get(key)
        if (what == "create" and there is not None) or (what == "replace" and there != expected):
            return False
        self.content[key] = data
        return True


@dataclass
class Memory:
    """A store in memory, as one attempt sees it: the interface is `job.storage.base.Store`."""

    objects: Objects
    turn: Callable[[], None]
    """Called before each call; it returns when the call may happen."""
    faults: dict[int, str] = field(default_factory=dict)
    """By the number of the call."""
    calls: int = 0
    stale: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)
    """What is still shown of objects that changed, and how often."""
    uri: str = "memory://output"

    def _call(self) -> str | None:
        self.turn()
        self.calls += 1
        return self.faults.get(self.calls - 1)

    def _seen(self, key: str) -> bytes | None:
        times, old = self.stale.get(key, (0, None))
        if not times:
            return self.objects.content.get(key)
        self.stale[key] = (times - 1, old)
        return old

    def _write(self, what: str, key: str, data: bytes, expected: bytes | None = None) -> bool:
        fault = self._call()
        before = self.objects.content.get(key)
        if fault == "deny" and what in {"create", "replace"}:
            return False
        if fault == "lose":
            return True
        if fault == "repeat":
            self.objects.late.append((what, key, data, expected))
        if fault == "truncate" and what in {"create", "write", "replace"}:
            data = data[: len(data) // 2]
        done = self.objects.execute(what, key, data, expected)
        if fault == "delay":
            self.stale[key] = (2, before)
        return done

    def list_objects(self, prefix: str = "") -> list[Entry]:
        self._call()
        return [_entry(key, data) for key, data in sorted(self.objects.content.items()) if key.startswith(prefix)]

    def names(self, prefix: str) -> list[str]:
        found = (entry.key.removeprefix(prefix) for entry in self.list_objects(prefix))
        return sorted({prefix + name.partition("/")[0] + "/" * ("/" in name) for name in found})

    def head(self, key: str) -> Entry | None:
        self._call()
        data = self._seen(key)
        return None if data is None else _entry(key, data)

    def read(self, key: str) -> bytes | None:
        self._call()
        return self._seen(key)

    def write(self, key: str, data: bytes) -> None:
        self._write("write", key, data)

    def create(self, key: str, data: bytes) -> bool:
        return self._write("create", key, data)

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        return self._write("replace", key, data, expected)

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        data = path.read_bytes()
        self._write("upload", key, data)
        if self.objects.content.get(key) != data:
            raise StorageError(f"{key} is not there after its upload", remedy="Start again.")

    def download(self, entry: Entry, path: Path) -> None:
        self._call()
        if (data := self.objects.content.get(entry.key)) is None:
            raise MissingError(entry.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def delete(self, key: str) -> None:
        self._call()
        self.objects.content.pop(key, None)

    def copy(self, key: str, target: str) -> None:
        if (data := self.objects.content.get(key)) is None:
            raise MissingError(key)
        self._write("copy", target, data)

    def remove_unfinished(self, prefix: str) -> int:
        return 0


def _entry(key: str, data: bytes) -> Entry:
    return Entry(key=key, size=len(data), etag=hashlib.md5(data, usedforsecurity=False).hexdigest(), version=None)


@dataclass(frozen=True)
class Kind:
    """How an attempt is started."""

    name: str
    resume: str = "auto"
    setting: str = "a"
    """What decides what is trained."""
    allowed: bool = False
    """Whether it may continue what another setting began."""


AUTO, FRESH, CHANGED = Kind("auto"), Kind("fresh", resume="fresh"), Kind("changed", setting="b", allowed=True)
OTHER = Kind("other", resume="fresh", setting="c")


def story(store: Memory, kind: Kind, directory: Path) -> int:
    """One attempt, in the order of `job.run`: its exit code."""
    ledger = Ledger(store=store, run_id=RUN)
    record, publication = Record(ledger=ledger), Publication(ledger=ledger)
    attempts = Attempts(store=store, closing=lambda _: store, run_id=RUN)
    try:
        code = _story(kind, directory, ledger, record, publication, attempts)
    except StorageError:
        code = 74
    except FencedError:
        code = 76
    except ConfigError:
        code = 78
    if code and ledger.attempt:
        with contextlib.suppress(StorageError):
            attempts.end("ended", exit_code=code)
    return code


def _story(
    kind: Kind, directory: Path, ledger: Ledger, record: Record, publication: Publication, attempts: Attempts
) -> int:
    published = None if kind.resume == "fresh" else _finished(publication, kind)
    if published is not None:
        if attempts.completed(since=published.attempt):
            publication.restore(published)
        else:
            publication.proclaim(published)
            attempts.complete_late(published.attempt)
        return 0
    above = ledger.progress().attempt
    ledger.attempt = attempts.claim(PROCESS, fencing="auto", from_step=0, versions={}, above=above)
    ledger.owner, ledger.conditional = attempts.owner, attempts.conditional
    if kind.resume == "fresh":
        ledger.fence()
        ledger.start_over()
    _same(kind, record.first())
    ledger.fence()
    restored = checkpoints.restore(ledger, directory / "restored", check=lambda *_: None)
    _same(kind, restored and restored.body)
    if (published := _finished(publication, kind)) is not None:
        publication.proclaim(published)
        attempts.end("complete", exit_code=0)
        return 0
    first = restored.step + 1 if restored else 1
    if restored is None:
        ledger.check()
        record.pin(settings={}, inputs={"files": []}, fingerprint={"s": kind.setting}, reproducibility_facts={})
        _same(kind, record.first())
    kept = [restored.prefix] if restored else []
    for step in range(first, STEPS + 1):
        facts = checkpoints.upload(
            ledger.store, run_id=RUN, attempt=ledger.attempt, step=step, directory=checkpoint_files(directory, step)
        )
        ledger.append("checkpoint", **facts, fingerprint={"s": kind.setting}, plan={})
        kept = [*kept, facts["data"]][-1:]
        checkpoints.prune(ledger.store, run_id=RUN, attempts=range(ledger.life, ledger.attempt + 1), kept=kept)
    final = {"steps": STEPS, "plan": {}, "fingerprint": {"s": kind.setting}, "results": {"by": ledger.life}}
    final = publication.win({**final, "versions": {}}, checkpoint=restored.number if restored and first > STEPS else 0)
    artifacts = publication.upload(adapter_files(directory, f"{ledger.life} {kind.setting}"), name="adapter")
    publication.proclaim(publication.publish(final, artifacts))
    attempts.end("complete", exit_code=0)
    return 0


PROCESS = SimpleNamespace(host="walk", pod=None, gpus=())


def _same(kind: Kind, found: dict[str, Any] | None) -> None:
    if found is not None and not kind.allowed and found["fingerprint"] != {"s": kind.setting}:
        raise ConfigError("begun with other settings", remedy="")


def _finished(publication: Publication, kind: Kind) -> Published | None:
    published = publication.published()
    if published is not None and published.body["fingerprint"] != {"s": kind.setting}:
        raise ConfigError("finished with other settings", remedy="")
    return published


def checkpoint_files(directory: Path, step: int) -> Path:
    """The files of a checkpoint."""
    place = directory / f"step-{step}"
    place.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"event": "train_progress", "step": done}) for done in range(1, step + 1)]
    (place / checkpoints.HISTORY).write_text("\n".join(lines))
    return place


def adapter_files(directory: Path, content: str) -> Path:
    """The files of an adapter."""
    place = directory / "adapter"
    place.mkdir(parents=True, exist_ok=True)
    (place / "README.md").write_text(f"card of {content}")
    (place / "adapter_model.safetensors").write_text(f"weights of {content}")
    return place


class Actor:
    """An attempt in a thread, which goes on only when it is let."""

    def __init__(self, objects: Objects, kind: Kind, program: Program, directory: Path, faults: dict[int, str]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._killed = False
        self.code: int | None = None
        self.error: BaseException | None = None
        self.done = False
        self.store = Memory(objects, self._turn, faults)
        self._thread = threading.Thread(target=self._run, args=(kind, program, directory), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _turn(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self._killed:
            raise Killed

    def _run(self, kind: Kind, program: Program, directory: Path) -> None:
        try:
            self.code = program(self.store, kind, directory)
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - shown by whoever runs the schedule
            self.error = error
        self.done = True
        self._stopped.release()

    def step(self) -> None:
        """Let the next call happen, and run up to the one after it."""
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        """End the attempt where it is."""
        if not self.done:
            self._killed = True
            self.step()


Program = Callable[[Memory, Kind, Path], int]


@dataclass
class World:
    """One output, and who works on it."""

    directory: Path
    program: Program = story
    objects: Objects = field(default_factory=Objects)
    actors: list[Actor] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)
    """Hashes of the files of results that were ever published, by key."""
    states: set[int] = field(default_factory=set)
    _shown: dict[str, bytes | None] = field(default_factory=dict)

    def start(self, kind: Kind, faults: dict[int, str] | None = None) -> Actor:
        """Begin another attempt; it stops before its first call."""
        place = self.directory / str(len(self.actors))
        actor = Actor(self.objects, kind, self.program, place, faults or {})
        self.actors.append(actor)
        self.kinds.append(kind)
        return actor

    def step(self, actor: Actor) -> None:
        """One call of an attempt, and a look at what is then there."""
        actor.step()
        self.look(faulty=any(fault == "truncate" for each in self.actors for fault in each.store.faults.values()))

    def run(self, actor: Actor, calls: int | None = None) -> None:
        """So many calls of an attempt, or all that are left."""
        for _ in itertools.count() if calls is None else range(calls):
            if actor.done:
                return
            self.step(actor)

    def deliver(self, index: int = 0) -> None:
        """Execute a request again that the network held back."""
        if self.objects.late:
            self.objects.execute(*self.objects.late.pop(index))
            self.look(faulty=True)

    def look(self, *, faulty: bool) -> None:
        """Raise WrongError if the output says something false, or has lost a result that it proclaimed."""
        content = self.objects.content
        self.states.add(hash((frozenset(content.items()), tuple(actor.store.calls for actor in self.actors))))
        for key in (DONE, "latest.json"):
            data, before = content.get(key), self._shown.get(key)
            self._shown[key] = data
            body, old = json_object.decode(data), json_object.decode(before)
            if body is not None:
                self._check_true(key, body)
            elif before is not None and not faulty:
                raise WrongError(f"{key} is gone or damaged")
            if old and body and old.get("record", 0) > body.get("record", 0) and not faulty:
                raise WrongError(f"{key} went back from record {old['record']} to {body.get('record')}")
        for key, wanted in self.published.items():
            if _sha256(content.get(key)) != wanted:
                raise WrongError(f"{key} was published and is not what it was")

    def _check_true(self, name: str, body: dict[str, Any]) -> None:
        content, prefix = self.objects.content, f"{RUN}/{body['prefix']}/" if "prefix" in body else f"{RUN}/"
        for artifact in body["artifacts"]:
            key = prefix + artifact["name"]
            if _sha256(content.get(key)) != artifact["sha256"]:
                raise WrongError(f"{name} lists {key} with a hash that it does not have")
            if "prefix" in body:
                self.published[key] = artifact["sha256"]
        if "record" in body:
            record = json_object.decode(content.get(f"{RUN}/checkpoints/commits/{body['record']:06d}.json")) or {}
            different = [name for name in ("prefix", "artifacts", "published_at") if record.get(name) != body[name]]
            if record.get("kind") != "published" or different:
                raise WrongError(f"{name} is no copy of record {body['record']}: {different}")

    def finish(self) -> None:
        """End all attempts; then one more, alone, has to finish the run, and everything has to agree."""
        undisturbed = all(actor.done and actor.code is not None and not actor.store.faults for actor in self.actors)
        for actor in self.actors:
            actor.kill()
        while self.objects.late:
            self.deliver()
        settings = dict.fromkeys([replace(kind, name="last", resume="auto") for kind in reversed(self.kinds)] + [AUTO])
        codes = [self._alone(kind) for kind in settings]
        if 0 not in codes:
            raise WrongError(f"the run can never end: the last attempts end with {codes}")
        done, latest = (json_object.decode(self.objects.content.get(key)) for key in (DONE, "latest.json"))
        if not done or not latest or done["artifacts"] != latest["artifacts"]:
            raise WrongError("an attempt ended with 0, and done.json and latest.json do not agree")
        newest = Ledger(store=Memory(self.objects, lambda: None), run_id=RUN).progress().published
        if "record" in done and (newest is None or newest.number != done["record"]):
            raise WrongError(f"done.json is of record {done['record']}, the newest is {newest and newest.number}")
        if undisturbed and "prefix" in done:
            self._check_copies(done)

    def _check_copies(self, done: dict[str, Any]) -> None:
        wanted = {f"{RUN}/{file['name']}": file["sha256"] for file in done["artifacts"]}
        copies = {key: _sha256(data) for key, data in self.objects.content.items() if key.startswith(f"{RUN}/adapter/")}
        if copies != wanted:
            raise WrongError(f"the copies in adapter/ are not those of record {done['record']}")

    def _alone(self, kind: Kind) -> int | None:
        """The exit code of an attempt that nothing disturbs, or of its successors."""
        for _ in range(3):
            actor = self.start(kind)
            self.run(actor)
            if actor.code in {0, 78}:
                break
        return actor.code


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _honest(world: World) -> None:
    """Whoever ended with 0 has a finished run to show."""
    for actor in world.actors:
        if actor.code not in ENDS | {None}:
            raise WrongError(f"an attempt ended with {actor.code}")
        if actor.code == 0 and not actor.store.faults and DONE not in world.objects.content:
            raise WrongError("an attempt ended with 0, and there is no done.json")


@dataclass
class Walk:
    """Many schedules, each over an output of its own."""

    program: Program = story
    schedules: int = 0
    states: int = 0

    def world(self) -> World:
        """A new output."""
        self._place = Path(tempfile.mkdtemp(prefix="walk-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        return World(self._place, self.program)

    def check(self, schedule: str, act: Callable[[World], None]) -> None:
        """Run one schedule to its end."""
        world = self.world()
        try:
            act(world)
            _honest(world)
            world.finish()
            _honest(world)
        except WrongError as wrong:
            raise WrongError(f"{schedule}: {wrong}") from None
        finally:
            for actor in world.actors:
                actor.kill()
            shutil.rmtree(self._place, ignore_errors=True)
        self.schedules += 1
        self.states += len(world.states)

    def calls(self, kind: Kind) -> int:
        """How many calls an undisturbed attempt makes."""
        world = self.world()
        actor = world.start(kind)
        world.run(actor)
        return actor.store.calls

    def one_stop(self, first: Kind, second: Kind, stops: range) -> None:
        """The first attempt is stopped before each call; the second runs to its end; the first is killed or goes on."""
        for stop, goes_on in itertools.product(stops, (False, True)):

            def act(world: World, stop: int = stop, goes_on: bool = goes_on) -> None:
                one = world.start(first)
                world.run(one, stop)
                two = world.start(second)
                world.run(two)
                if goes_on:
                    world.run(one)
                else:
                    one.kill()

            self.check(f"{first.name} stopped at {stop}, {second.name}, {'goes on' if goes_on else 'killed'}", act)

    def two_stops(self, first: Kind, second: Kind, pairs: Iterator[tuple[int, int]]) -> None:
        """The first attempt is stopped, then the second; the first goes on to its end, and then the second."""
        for stop, other in pairs:

            def act(world: World, stop: int = stop, other: int = other) -> None:
                one = world.start(first)
                world.run(one, stop)
                two = world.start(second)
                world.run(two, other)
                world.run(one)
                world.run(two)

            self.check(f"{first.name} stopped at {stop}, {second.name} at {other}", act)

    def faults(self, first: Kind, calls: range) -> None:
        """A store that fails in each way at each call of an attempt, before and after another has finished the run."""
        for call, fault in itertools.product(calls, FAULTS):

            def act(world: World, call: int = call, fault: str = fault) -> None:
                world.run(world.start(first, {call: fault}))
                world.run(world.start(AUTO))
                world.run(world.start(FRESH))
                world.deliver()

            self.check(f"{fault} at call {call} of {first.name}", act)

    def random(self, seed: int, runs: int, attempts: int = 3) -> None:
        """Random schedules with random faults; the seed of each is in its name."""
        for number in range(runs):
            source = random.Random(f"{seed}/{number}")

            def act(world: World, source: random.Random = source) -> None:
                for _ in range(attempts):
                    faults = {source.randrange(60): source.choice(FAULTS) for _ in range(source.choice((0, 0, 1, 2)))}
                    world.start(source.choice((AUTO, AUTO, FRESH, CHANGED, OTHER)), faults)
                while left := [actor for actor in world.actors if not actor.done]:
                    actor = source.choice(left)
                    world.run(actor, source.choice((1, 1, 2, 5, 20, 60)))
                    if source.random() < 0.05:
                        actor.kill()
                    if source.random() < 0.1:
                        world.deliver()

            self.check(f"--seed {seed}, run {number}", act)


def quiet() -> None:
    """No pauses and no log lines."""

    def drop(*_: Any) -> Any:
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
    json_object.PAUSE_SECONDS = 0.0


def main() -> int:
    """Run what was asked for; print how much was seen."""
    parser = argparse.ArgumentParser(description="walk through the interleavings of attempts at one run")
    parser.add_argument("--pairs", action="store_true", help="every pair of stops, instead of random schedules")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--runs", type=int, default=1000)
    asked = parser.parse_args()
    quiet()
    walk = Walk()
    if asked.pairs:
        calls = walk.calls(AUTO)
        for second in (AUTO, FRESH, CHANGED):
            walk.two_stops(AUTO, second, itertools.product(range(calls + 1), range(calls + 9)))
            sys.stdout.write(f"auto and {second.name}: {walk.schedules} schedules, {walk.states} states\n")
    else:
        sys.stdout.write(f"seed {asked.seed}\n")
        walk.random(asked.seed, asked.runs)
    sys.stdout.write(f"{walk.schedules} schedules, {walk.states} states, nothing false, nothing lost\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
