"""What is published, where the output holds what no attempt of this version has left there: old, damaged, deleted."""

import itertools
import json

import pytest
from structlog.testing import capture_logs

from job.runtime.errors import AccessDeniedError, ConfigError, StorageError
from job.state import json_object
from job.state.attempts import Attempts
from job.state.ledger import Ledger
from job.state.publication import Publication
from job.state.record import Record
from tests.state import walk
from tests.state.walk import AUTO, DONE, FRESH, OTHER, RUN, Kind, Memory, Objects, World

COMMITS = f"{RUN}/checkpoints/commits/"


pytestmark = pytest.mark.usefixtures("quiet_walk")


@pytest.fixture
def world(tmp_path) -> World:
    """An empty output; whoever is left in it ends with the test."""
    found = World(tmp_path)
    yield found
    for actor in found.actors:
        actor.kill()


def code(world: World, kind: Kind = AUTO) -> int | None:
    """The exit code of an attempt that nothing disturbs."""
    actor = world.start(kind)
    while not actor.done:
        actor.step()
    return actor.code


def until(world: World, actor: walk.Actor, key: str) -> None:
    """Let an attempt run until an object exists."""
    while key not in world.objects.content:
        world.step(actor)


def body(world: World, key: str) -> dict:
    """An object."""
    return json.loads(world.objects.content[key])


def change(world: World, key: str, **fields) -> None:
    """Change fields of an object."""
    world.objects.content[key] = json.dumps(body(world, key) | fields).encode()


def record(world: World, kind: str) -> str:
    """The key of the newest ledger record of a kind."""
    return max(key for key in world.objects.content if key.startswith(COMMITS) and body(world, key)["kind"] == kind)


def publication(world: World, *, uri: str = "memory://output") -> Publication:
    """As a start of the run sees it."""
    return Publication(ledger=Ledger(store=Memory(world.objects, lambda: None, uri=uri), run_id=RUN))


def test_the_end_of_a_lost_attempt_is_its_own(world):
    """A start repairs what attempt 1 left undone while attempt 2 begins the run anew: that is no end of attempt 2, so
    that what attempt 2 leaves undone is repaired, too."""
    first = world.start(AUTO)
    until(world, first, f"{COMMITS}000005.json")
    first.kill()
    second = world.start(FRESH)
    until(world, second, f"{RUN}/attempts/0002.json")
    assert code(world) == 0
    assert f"{RUN}/attempts/0002.end.json" not in world.objects.content
    until(world, second, f"{COMMITS}000012.json")
    assert body(world, record(world, "published"))["attempt"] == 2
    second.kill()
    world.finish()


@pytest.mark.parametrize("stop", range(8, 24))
def test_a_replaced_attempt_pins_nothing(tmp_path, stop):
    """An attempt stops anywhere before its first step; another starts the run over with other settings; the first
    goes on: it pins nothing that the second would have to obey."""
    for other in range(4, 30):
        world = World(tmp_path / str(other))
        first = world.start(AUTO)
        world.run(first, stop)
        second = world.start(OTHER)
        world.run(second, other)
        claimed = f"{RUN}/attempts/0002.json" in world.objects.content
        world.run(first)
        world.run(second)
        if claimed:
            assert second.code == 0, (stop, other)


def test_copies_are_of_one_publication(world):
    """An attempt stops between two copies, another starts over and publishes, the first goes on."""
    first = world.start(AUTO)
    until(world, first, f"{RUN}/adapter/adapter_model.safetensors")
    other = world.start(Kind("fresh b", resume="fresh", setting="b"))
    world.run(other)
    assert other.code == 0
    world.run(first)
    world.finish()


def test_old_results_without_a_ledger(world):
    """A run that an earlier version finished stays finished if somebody deleted its checkpoints and their records."""
    done = {"layout": 1, "run_id": RUN, "fingerprint": {"s": "a"}, "artifacts": []}
    world.objects.content[DONE] = json.dumps(done).encode()
    assert publication(world).published().number == 0


def test_results_without_their_ledger(world):
    """With the records gone, done.json proves nothing: 78, with what to do; and a new life never reuses a prefix."""
    assert code(world) == 0
    old = {key: data for key, data in world.objects.content.items() if "/results/" in key}
    for key in [key for key in world.objects.content if "/checkpoints/" in key]:
        del world.objects.content[key]
    with pytest.raises(ConfigError, match="are gone") as found:
        publication(world).published()
    assert "TUNE_RESUME=fresh" in found.value.remedy
    assert code(world, FRESH) == 0
    assert old.items() <= world.objects.content.items()
    world.finish()


def test_another_attempt_finishes_meanwhile(world):
    """An attempt that listed no record, and stood still until another had finished the run, sees that it is over."""
    calls = itertools.count()

    def turn() -> None:
        if next(calls) == 1:  # the listing was before
            code(world)

    store = Memory(world.objects, turn)
    assert Publication(ledger=Ledger(store=store, run_id=RUN)).published().number > 0


def test_a_run_id_that_is_used_again(world):
    """Somebody deleted the run; latest.json still names its results. A new run of this id replaces it."""
    for kind in (AUTO, FRESH):
        assert code(world, kind) == 0
    world.objects.content = {"latest.json": world.objects.content["latest.json"]}
    world.published.clear()
    assert code(world) == 0
    world.finish()
    assert body(world, "latest.json")["record"] == body(world, DONE)["record"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix": "../../x"},
        {"prefix": "results/000099"},
        {"prefix": ""},
        {"artifacts": [5]},
        {"artifacts": [{"name": "adapter/x", "size": 1}]},
        {"artifacts": [{"name": "../x", "size": 1, "sha256": ""}]},
        {"artifacts": [{"name": ["adapter"], "size": 1, "sha256": ""}]},
        {"final": 3},
    ],
    ids=str,
)
def test_a_published_record_that_is_damaged(world, fields):
    """It is no record: the run is published again from its last checkpoint, and nothing is deleted."""
    assert code(world) == 0
    before = {key: data for key, data in world.objects.content.items() if "/results/" in key}
    change(world, record(world, "published"), **fields)
    del world.objects.content[f"{RUN}/attempts/0001.end.json"]
    assert code(world) == 0
    assert before.items() <= world.objects.content.items()
    newest = publication(world).published()
    assert newest.body["record"] == body(world, DONE)["record"] == body(world, "latest.json")["record"]


@pytest.mark.parametrize(
    "found", [{}, {"fingerprint": 5, "artifacts": []}, {"fingerprint": {}, "artifacts": [1]}], ids=str
)
def test_an_old_done_json_that_is_damaged(world, found):
    """It proves nothing."""
    world.objects.content[DONE] = json.dumps(found).encode()
    assert publication(world).published() is None


def test_an_old_run_that_was_started_over_and_finished(world):
    """Its inputs are where that version pinned them, whatever the life."""
    assert code(world, FRESH) == 0
    for key in [key for key in world.objects.content if key.startswith(COMMITS)]:
        change(world, key, layout=1)
        if body(world, key)["kind"] == "published":
            del world.objects.content[key]
    done = {name: value for name, value in body(world, DONE).items() if name not in {"record", "prefix"}}
    world.objects.content[DONE] = json.dumps(done).encode()
    world.objects.content[f"{RUN}/inputs.json"] = world.objects.content.pop(f"{RUN}/lives/0001/inputs.json")
    found = publication(world)
    assert found.published().number == 0
    assert Record(ledger=found.ledger).inputs() is not None


def test_a_result_that_latest_json_may_not_name(world):
    """`promoted` says so."""
    first = world.start(AUTO)
    until(world, first, f"{COMMITS}000005.json")
    first.kill()
    change(world, record(world, "published"), promoted=False)
    assert code(world) == 0
    assert "latest.json" not in world.objects.content


@pytest.mark.parametrize("found", [{"record": 9, "run_id": "other"}, {"record": 9, "run_id": "x", "published_at": 7}])
def test_a_latest_json_without_a_time(world, found):
    """It is newer than nothing."""
    world.objects.content["latest.json"] = json.dumps(found).encode()
    assert code(world) == 0
    assert body(world, "latest.json")["run_id"] == RUN


@pytest.mark.parametrize("name", ["run.json", "inputs.json"])
@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"5", b"{", b"[" * 100_000, b'{"files": [1]}'], ids=lambda it: it[:9]
)
def test_what_was_pinned_is_damaged(world, name, content):
    """It ends with 74 and what to do, not with an unexpected error."""
    world.objects.content[f"{RUN}/{name}"] = content
    record = Record(ledger=Ledger(store=Memory(world.objects, lambda: None), run_id=RUN))
    with pytest.raises(StorageError, match="is damaged"):
        record.first() if name == "run.json" else record.inputs()


DEEP = b'{"layout": 2, "fingerprint": {}, "files": [], "x": ' + b"[" * 500 + b"]" * 500 + b"}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", DEEP),
        ("inputs.json", DEEP),
        ("run.json", b'{"fingerprint": {}, "plan": [1]}'),
        ("run.json", b'{"fingerprint": {}, "plan": {"micro_batch": "8", "batching": "padded"}}'),
        ("run.json", b'{"fingerprint": {}, "asked": 5}'),
        ("inputs.json", b'{"files": [], "date": "yesterday"}'),
        ("inputs.json", b'{"files": [], "date": 5}'),
    ],
    ids=lambda it: it if isinstance(it, str) else it[-30:],
)
def test_what_was_pinned_has_another_shape(world, name, content):
    """Whatever a later attempt would stumble over counts as damaged: nested too deeply, or of other types."""
    world.objects.content[f"{RUN}/{name}"] = content
    pinned = Record(ledger=Ledger(store=Memory(world.objects, lambda: None), run_id=RUN))
    with pytest.raises(StorageError, match=f"memory://output/{RUN}/{name} is damaged"):
        pinned.first() if name == "run.json" else pinned.inputs()


@pytest.mark.parametrize(
    "fields", [{"x": json.loads("[" * 200 + "]" * 200)}, {"plan": {"micro_batch": "8"}}], ids=["deep", "plan"]
)
def test_a_record_of_another_shape(world, fields):
    """It is no record; the run goes on behind it and is published."""
    assert code(world) == 0
    change(world, record(world, "published"), **fields)
    found = publication(world)
    assert found.ledger.read(int(record(world, "checkpoint")[-11:-5])).kind == "checkpoint"
    assert found.published() is None


@pytest.mark.parametrize("outcome", [["unknown"], {"a": 1}, None])
def test_an_end_of_another_shape(world, outcome):
    """An attempt's end whose outcome is no text says nothing."""
    world.objects.content[f"{RUN}/attempts/0001.json"] = b'{"attempt": 1}'
    world.objects.content[f"{RUN}/attempts/0001.end.json"] = json.dumps({"outcome": outcome}).encode()
    attempts = Attempts(store=Memory(world.objects, lambda: None), closing=lambda _: None, run_id=RUN, number=2)
    assert attempts._failures_before(None) == 0


@pytest.mark.parametrize("lost", ["adapter/adapter_model.safetensors", "adapter/README.md"])
def test_results_that_somebody_deleted(world, lost):
    """The run is finished, but its files are gone: 78 with their names and what to do; restored, it is complete."""
    assert code(world) == 0
    found = publication(world)
    published = found.published()
    found.check_results(published)
    key = f"{RUN}/{published.prefix}/{lost}"
    data = world.objects.content.pop(key)
    for there in ({}, {key: data[:-1]}):
        world.objects.content |= there
        with pytest.raises(ConfigError, match="1 of the 2 files") as caught:
            found.check_results(published)
        assert f"memory://output/{key}" in caught.value.message
        assert "TUNE_RESUME=fresh" in caught.value.remedy
    world.objects.content[key] = data
    found.check_results(published)


class Guarded(Memory):
    """A store in which this identity may not touch one object."""

    def read(self, key: str) -> bytes | None:
        """All but one."""
        if key == "latest.json":
            raise AccessDeniedError(f"GetObject on {key} was denied.", remedy="Ask.")
        return super().read(key)


def test_a_latest_json_that_is_denied(world):
    """It belongs to all runs of an output: a run that may not write it warns, and is complete."""
    assert code(world) == 0
    found = Publication(ledger=Ledger(store=Guarded(world.objects, lambda: None), run_id=RUN))
    published = found.published()
    for act in (found.restore, found.proclaim):
        with capture_logs() as logs:
            act(published)
        (warning,) = [line for line in logs if line["event"] == "latest_not_written"]
        assert warning["uri"] == "memory://output/latest.json"
        assert "denied" in warning["reason"]


def test_a_latest_json_from_the_future(world):
    """It is not replaced, since its run may be newer; it is said, with what to do."""
    later = {"run_id": "other", "record": 9, "published_at": "2999-01-01T00:00:00Z", "artifacts": []}
    world.objects.content["latest.json"] = json.dumps(later).encode()
    assert code(world) == 0
    assert body(world, "latest.json")["run_id"] == "other"
    found = publication(world)
    with capture_logs() as logs:
        found.proclaim(found.published())
    (warning,) = [line for line in logs if line["event"] == "latest_not_replaced"]
    assert (warning["run_id"], warning["published_at"]) == ("other", "2999-01-01T00:00:00Z")
    assert "Delete latest.json" in warning["remedy"]


class Refusing(Memory):
    """A store that says of every `If-Match` that it does not hold."""

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        """Never."""
        self._call()
        return False


def test_a_store_that_refuses_to_replace():
    """A condition that is refused while what it names is there all the time is not understood."""
    store = Refusing(Objects(), lambda: None)
    store.write("latest.json", b"{}")
    assert json_object.put(store, "latest.json", b'{"a": 1}', conditional=True, replaces=lambda _: True) == b'{"a": 1}'
