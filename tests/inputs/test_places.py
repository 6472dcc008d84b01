"""One rule says which files of a place are learned, held out and left out, wherever the place is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from structlog.testing import capture_logs

from job.inputs.data_files import choose
from job.inputs.dataset_card import LONGEST, declared_splits
from job.inputs.files import DataFiles
from job.inputs.pull import Puller, Sources, listing
from job.runtime.errors import DataError
from job.storage.faults import MissingError
from tests.hub_server import serve_hub

ROW = b'{"text": "x"}\n'
HEADER = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: raw/*.jsonl
  - split: validation
    path: checked/**
---
"""
Filled = Callable[[dict[str, bytes]], str]
"""Puts files into a place; returns its address."""


@pytest.fixture
def folder(tmp_path: Path) -> Filled:
    def fill(files: dict[str, bytes]) -> str:
        for name, content in files.items():
            path = tmp_path / "place" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(tmp_path / "place")

    return fill


@pytest.fixture
def bucket(s3_env: str) -> Filled:
    def fill(files: dict[str, bytes]) -> str:
        for name, content in files.items():
            boto3.client("s3").put_object(Bucket=s3_env, Key=f"place/{name}", Body=content)
        return f"s3://{s3_env}/place"

    return fill


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Filled]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve_hub({}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)

        def fill(files: dict[str, bytes]) -> str:
            hub.repositories["org/place"] = files
            return "hf://datasets/org/place"

        yield fill


def sources(uri: str, *, evaluation: tuple[str, ...] = (), hold_out: bool = True) -> Sources:
    return Sources(
        model="org/model",
        dataset=(uri,),
        eval_dataset=evaluation,
        chat_template="tokenizer",
        patience_seconds=5,
        hold_out=hold_out,
    )


def puller(directory: Path, named: Sources, names: frozenset[str] | None = None) -> Puller:
    return Puller(sources=named, directory=directory, names=names, weights=False)


def names(files: DataFiles, uri: str) -> tuple[list[str], list[str], dict[str, str]]:
    top = uri.removeprefix("hf://datasets/") + "/"
    read, held = ([file.name.removeprefix(top) for file in side] for side in (files.files, files.held_out))
    return read, held, {one.name.removeprefix(top): one.reason for one in files.left_out}


SPLITS = {"train.jsonl": ROW, "validation.jsonl": ROW * 2, "test.jsonl": ROW * 3, "README.md": b"# data"}
SHARDED = {
    "data/train-00000-of-00002.jsonl": ROW,
    "data/train-00001-of-00002.jsonl": ROW,
    "data/test-00000-of-00001.jsonl": ROW,
    "data/extra.jsonl": ROW,
}
WORKING = {
    "part-0.jsonl": ROW,
    "_temporary/0/_temporary/attempt_1/part-1.jsonl": ROW,
    "_SUCCESS": b"",
    ".part-0.jsonl.crc": b"crc",
    ".Trash-1000/files/old.jsonl": ROW,
    ".ipynb_checkpoints/part-0-checkpoint.jsonl": ROW,
    "__MACOSX/._part-0.jsonl": b"mac",
    "_day=1/part-2.jsonl": ROW,
    "dataset_info.json": b"{}",
}
DECLARED = {"README.md": HEADER, "raw/a.jsonl": ROW, "checked/b/c.jsonl": ROW, "other.jsonl": ROW}


@pytest.mark.parametrize(
    ("files", "read", "held_out", "left_out"),
    [
        pytest.param(SPLITS, ["train.jsonl"], ["validation.jsonl"], {"test.jsonl", "README.md"}, id="splits"),
        pytest.param(
            SHARDED,
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            ["data/test-00000-of-00001.jsonl"],
            {"data/extra.jsonl"},
            id="shards",
        ),
        pytest.param(
            WORKING,
            ["_day=1/part-2.jsonl", "part-0.jsonl"],
            [],
            {"_temporary/", "_SUCCESS", ".part-0.jsonl.crc", ".Trash-1000/", ".ipynb_checkpoints/", "__MACOSX/"}
            | {"dataset_info.json"},
            id="working folders",
        ),
        pytest.param(DECLARED, ["raw/a.jsonl"], ["checked/b/c.jsonl"], {"other.jsonl", "README.md"}, id="declared"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "bucket", pytest.param("repository", marks=pytest.mark.process)])
def test_one_rule_for_places(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    files: dict[str, bytes],
    read: list[str],
    held_out: list[str],
    left_out: set[str],
) -> None:
    """What is learned, held out and left out depends on the names, not on where they are."""
    uri = request.getfixturevalue(kind)(files)
    found = puller(tmp_path / "scratch", sources(uri)).data("training")
    got_read, got_held_out, got_left_out = names(found, uri)
    assert (got_read, got_held_out, got_left_out.keys()) == (read, held_out, left_out)
    assert [file.path.read_bytes() for file in found.files + found.held_out] == [files[n] for n in read + held_out]


@pytest.mark.parametrize(
    ("there", "read", "held_out"),
    [
        pytest.param(["train.csv", "valid.csv", "test.csv"], ["train.csv"], ["valid.csv"], id="valid"),
        pytest.param(["training.json.gz", "eval.json.gz"], ["training.json.gz"], ["eval.json.gz"], id="eval"),
        pytest.param(["Train.jsonl", "DEV.jsonl"], ["Train.jsonl"], ["DEV.jsonl"], id="capitals"),
        pytest.param(["my_train_1.jsonl", "my-test 2.jsonl"], ["my_train_1.jsonl"], ["my-test 2.jsonl"], id="words"),
        pytest.param(["train/a.csv", "val/a.csv", "testing/a.csv"], ["train/a.csv"], ["val/a.csv"], id="folders"),
        pytest.param(["split=train/a.csv", "split=test/a.csv"], ["split=train/a.csv"], ["split=test/a.csv"], id="hive"),
        pytest.param(["my-train-data/a.csv", "my-train-data/dev.csv"], ["my-train-data/a.csv"],
                     ["my-train-data/dev.csv"], id="the file's name before the folder's"),
        pytest.param(["a.csv", "b.csv", "test.csv"], ["a.csv", "b.csv"], ["test.csv"], id="no train"),
        pytest.param(["held_out.csv", "holdout-2.csv", "x.csv"], ["x.csv"], ["held_out.csv", "holdout-2.csv"],
                     id="English"),
        pytest.param(["contest.csv", "latest.csv", "evaluate.csv", "valued.csv", "devices.csv"],
                     ["contest.csv", "devices.csv", "evaluate.csv", "latest.csv", "valued.csv"], [], id="other words"),
        pytest.param(["train_test.csv"], ["train_test.csv"], [], id="two words"),
        pytest.param(["train_val.csv", "test.csv"], ["train_val.csv"], ["test.csv"], id="two words and a test"),
        pytest.param(["test.csv"], ["test.csv"], [], id="the only split"),
        pytest.param(["validation_matched.csv", "validation_mismatched.csv", "train.csv"], ["train.csv"],
                     ["validation_matched.csv", "validation_mismatched.csv"], id="two validations"),
        pytest.param(["en-00000-of-00002.csv", "en-00001-of-00002.csv"],
                     ["en-00000-of-00002.csv", "en-00001-of-00002.csv"], [], id="shards of no split"),
        pytest.param(["a.csv", "x_$folder$", "~$a.csv", "a.csv.tmp", "lost+found/"], ["a.csv"], [], id="left-overs"),
    ],
)  # fmt: skip
def test_what_names_say(there: list[str], read: list[str], held_out: list[str]) -> None:
    """The words that Hugging Face's `datasets` looks for, as words, in the file's name and then in the folders'."""
    found = choose("/place", there, hold_out=True)
    assert (list(found.files), list(found.held_out)) == (read, held_out)
    assert {one.name for one in found.left_out} == {*there} - {*read} - {*held_out}


@pytest.mark.parametrize(
    ("there", "words", "remedy"),
    [
        pytest.param(["t/_delta_log/00.json", "t/a.parquet"], "/place/t is a Delta table", "DeltaTable", id="Delta"),
        pytest.param(["_delta_log/", "a.parquet"], "/place is a Delta table", "delta", id="Delta, not entered"),
        pytest.param(["w/t/metadata/v1.metadata.json", "w/t/data/a.parquet"], "/place/w/t is an Iceberg table",
                     "pyiceberg", id="Iceberg"),
        pytest.param(["metadata/snap-1-2.avro", "data/a.parquet"], "/place is an Iceberg table", "scan", id="snapshot"),
        pytest.param([".hoodie/hoodie.properties", "d=1/a.parquet"], "is a Hudi table", "hudi", id="Hudi"),
        pytest.param(["x.lance/data/1.lance", "x.lance/_versions/1.manifest"], "/place/x.lance is a Lance dataset",
                     "lance.dataset", id="Lance"),
        pytest.param(["train/data-00000-of-00001.arrow", "train/state.json", "train/dataset_info.json"],
                     "/place/train is a folder of Dataset.save_to_disk", "load_from_disk", id="save_to_disk"),
        pytest.param(["a.jsonl", "a.jsonl.gz"], "a.jsonl and a.jsonl.gz, perhaps the same data twice", "Remove one",
                     id="packed and not"),
        pytest.param(["train.csv", "train.parquet", "test.csv"], "perhaps the same data twice", "Remove one",
                     id="two types"),
        pytest.param(["dev.csv", "test.csv"], "no split 'train'. It has test: test.csv; validation: dev.csv",
                     "Name the files", id="no training data"),
        pytest.param(["train_sft-00000-of-00001.csv", "train_gen-00000-of-00001.csv"], "train_gen", "Name the files",
                     id="two kinds of training"),
    ],
)  # fmt: skip
def test_what_is_not_guessed(there: list[str], words: str, remedy: str) -> None:
    """Tables of a format of their own, the same data twice and unclear splits are refused by name, with a remedy."""
    with pytest.raises(DataError) as caught:
        choose("/place", there, hold_out=True)
    assert words in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        pytest.param(["a-00000-of-00003.csv", "a-00002-of-00003.csv"], {"a-00001-of-00003.csv": "1 of its 3"}, id="1"),
        pytest.param(["d/train-00001-of-99999.csv"], {"d/train-00000-of-99999.csv": "99,998 of its 99,999"}, id="most"),
        pytest.param(["a-00001-of-00002.csv", "a-00002-of-00002.csv"], {}, id="counted from one"),
        pytest.param(["a-00000-of-00002.csv", "a-00001-of-00002.csv", "b-00000-of-00001.csv"], {}, id="whole"),
    ],
)  # fmt: skip
def test_shards_that_are_not_there(there: list[str], missing: dict[str, str]) -> None:
    """A copy that was not finished is seen by its names, and said; a part that was copied on purpose is read."""
    found = choose("/place", there)
    assert [*found.files] == there
    assert {one.name for one in found.left_out} == missing.keys()
    for one in found.left_out:
        assert missing[one.name] in one.reason


def test_a_table_in_the_bin_is_no_table() -> None:
    """What lies in a folder that is left out decides nothing."""
    assert choose("/place", [".Trash-1000/t/_delta_log/0.json", "_tmp/metadata/v1.metadata.json", "a.csv"]).files == (
        "a.csv",
    )


def test_no_evaluation_is_wanted(folder: Filled, tmp_path: Path) -> None:
    """Without held-out rows, or with evaluation files of the user's own, held-out files are left out."""
    uri = folder(SPLITS)
    found = puller(tmp_path / "scratch", sources(uri, hold_out=False)).data("training")
    read, held_out, left_out = names(found, uri)
    assert (read, held_out) == (["train.jsonl"], [])
    assert left_out["validation.jsonl"] == "held out: validation"


def test_an_evaluation_dataset_with_splits(folder: Filled, tmp_path: Path) -> None:
    """A place for evaluation brings its validation files, or else its test files, never its training files."""
    uri = folder(SPLITS)
    pulling = puller(tmp_path / "scratch", sources(uri, evaluation=(uri,), hold_out=False))
    assert names(pulling.data("training"), uri)[0] == ["train.jsonl"]
    assert names(pulling.data("evaluation"), uri)[0] == ["validation.jsonl"]


def test_a_file_that_is_named_is_read(bucket: Filled, tmp_path: Path) -> None:
    """The rule is for places with several files: what the user names is read, whatever it is called."""
    uri = bucket({"_temporary/test.jsonl": ROW, "train.jsonl": ROW})
    for name in ("_temporary/test.jsonl", "_temporary/"):
        (file,) = puller(tmp_path / "scratch", sources(f"{uri}/{name}")).data("training").files
        assert file.name == f"{uri}/_temporary/test.jsonl"


def test_only_what_is_read_is_downloaded(bucket: Filled, tmp_path: Path) -> None:
    """Files that are left out cost nothing: pictures beside the data may be large."""
    uri = bucket({**SPLITS, "picture.png": b"png"})
    puller(tmp_path / "scratch", sources(uri)).data("training")
    there = {path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file()}
    assert there >= {"train.jsonl", "validation.jsonl"}
    assert not there & {"picture.png", "test.jsonl", "README.md"}


def test_placeholders(s3_env: str, tmp_path: Path) -> None:
    """Empty objects that tools make for folders are no data, under either name, and hide none."""
    for key, content in {
        "d/": b"", "d": b"", "d/more": b"", "d/more/": b"", "d/more_$folder$": b"", "d/more/a.jsonl": ROW,
    }.items():  # fmt: skip
        boto3.client("s3").put_object(Bucket=s3_env, Key=key, Body=content)
    found = puller(tmp_path / "scratch", sources(f"s3://{s3_env}/d")).data("training")
    assert names(found, f"s3://{s3_env}/d")[0] == ["more/a.jsonl"]


def test_the_same_is_chosen_again(bucket: Filled, tmp_path: Path) -> None:
    """A later attempt reads what the first one read, also if files were added that would change the choice; what a
    finished run compares itself with is the same choice."""
    uri = bucket({"a.jsonl": ROW, "test.jsonl": ROW, "README.md": b"x"})
    named = sources(uri)
    first = puller(tmp_path / "scratch", named).data("training")
    read = [*first.files, *first.held_out]
    pinned = {"files": [file.as_json() for file in read]}
    assert listing(named, pinned=pinned) == pinned
    bucket({"train.jsonl": ROW, "README.md": b"y"})
    with capture_logs() as logs:
        later = puller(tmp_path / "again", named, frozenset(file.name for file in read)).data("training")
    assert [file.name for file in (*later.files, *later.held_out)] == [file.name for file in read]
    assert [line["first"] for line in logs if line["event"] == "inputs_added_later"] == [[f"{uri}/train.jsonl"]]
    assert listing(named, pinned=pinned) != pinned


def test_no_data_files(folder: Filled, tmp_path: Path) -> None:
    """A place without data says what it has."""
    uri = folder({"README.md": b"x", "_tmp/a.jsonl": ROW})
    with pytest.raises(MissingError, match=r"no data files.*README\.md"):
        puller(tmp_path / "scratch", sources(uri)).data("training")


@pytest.mark.parametrize(
    "header",
    ["configs: [", "- a", "configs: 1", "configs: [a]", "configs: [{data_files: 1}]",
     "configs: [{data_files: [{split: a}]}]", "configs: [{data_files: [[1]]}]", "configs: [{data_files: gone.jsonl}]",
     "configs: [{data_files: a.jsonl, data_dir: [a]}]", "configs: " + "[" * 100_000],
)  # fmt: skip
def test_a_header_that_is_not_valid(folder: Filled, tmp_path: Path, header: str) -> None:
    """A README that declares something else than files of splits is named."""
    uri = folder({"README.md": f"---\n{header}\n---\n".encode(), "a.jsonl": ROW})
    with pytest.raises(DataError, match=r"header of README\.md"):
        puller(tmp_path / "scratch", sources(uri)).data("training")


def doubled(first: bytes, more: bytes) -> bytes:
    """Ten lines of YAML of which each holds the one before ten times."""
    return b"".join(
        b"l%d: &l%d %s\n" % (level, level, more % b",".join([b"*l%d" % (level - 1)] * 10) if level else first)
        for level in range(10)
    )


@pytest.mark.parametrize(
    ("header", "says"),
    [
        pytest.param(
            doubled(b"lol", b"[%s]") + b"configs: [{data_files: a.jsonl, data_dir: *l9}]", "a text", id="lists"
        ),
        pytest.param(doubled(b"{a: 1}", b"{<<: [%s]}") + b"configs: [{data_files: a.jsonl}]", None, id="merges"),
        pytest.param(b"a: 1" + b":1" * 200_000 + b"\nconfigs: [{data_files: a.jsonl}]", None, id="base 60"),
        pytest.param(b"configs: [{data_files: '" + b"**a" * 1000 + b"b'}]", "no file of those", id="stars"),
        pytest.param(b"\n" * 400_000, None, id="blank lines"),
        pytest.param(b"a: " + b"b" * LONGEST, "more than 1,048,576 bytes", id="without an end"),
        pytest.param(
            b"configs: [{data_files: [" + b"a," * 20_000 + b"]}]", "20,000 patterns for 301 files", id="patterns"
        ),
    ],
)
def test_bombs_in_a_header(header: bytes, says: str | None) -> None:
    """A header cannot take memory or time: no alias is expanded, no pattern tried in all ways."""
    names = ["a.jsonl", *("a" * 200 + str(number) for number in range(300))]
    readme = (b"---\n" + header + b"\n---\n")[:LONGEST]
    if says is None:
        assert declared_splits("/p", readme, names) in ({}, {"train": ["a.jsonl"]})
    else:
        with pytest.raises(DataError, match=says):
            declared_splits("/p", readme, names)
