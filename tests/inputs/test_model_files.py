"""One list says which files are the model: what another loader would take for it is rejected, the rest is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import boto3
import pytest

from job.inputs.model_files import LARGEST, LARGEST_JSON, choose, folder_of, json_object
from job.inputs.pull import Puller, Sources
from job.model.base_model import inspect
from job.runtime.errors import DataError
from tests.hub_server import serve_hub

INDEX = "model.safetensors.index.json"
SHARDS = ("model-1.safetensors", "model-2.safetensors")
WHOLE = ("config.json", "model.safetensors", "tokenizer.json")
SHARDED = ("config.json", INDEX, *SHARDS)


def indexed(*files: object) -> bytes:
    return json.dumps(
        {"metadata": {}, "weight_map": {f"tensor.{number}": file for number, file in enumerate(files)}}
    ).encode()


def chosen(*names: str, index: bytes = indexed(*SHARDS), **sizes: int) -> list[str]:
    return choose("org/m", {**dict.fromkeys(names, 10), **sizes}, {INDEX: index}.__getitem__)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin"), id="pickles"),
        pytest.param(("consolidated.safetensors", "params.json"), id="the publisher's own format"),
        pytest.param(("model.fp16.safetensors", "model.safetensors.index.fp16.json"), id="a variant"),
        pytest.param(("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"), id="left by a trainer"),
        pytest.param(("modeling_x.py", "tokenization_x.py", "handler.py"), id="code"),
        pytest.param(("tekken.json",), id="a tokenizer that other programs prefer"),
        pytest.param(("chat_template.json", "preprocessor_config.json", "processor_config.json"), id="of processors"),
        pytest.param(("tokenizer.4.0.0.json", "tf_model.h5", "model.gguf"), id="other formats"),
        pytest.param(("checkpoint-9/config.json", "onnx/model.onnx", "original/tokenizer.model"), id="folders"),
    ],
)
def test_what_is_not_the_model_is_left_out(others: tuple[str, ...]) -> None:
    """Files that no loader takes, given this list, do not keep a model from being trained."""
    assert chosen(*WHOLE, *others) == sorted(WHOLE)
    assert chosen(*SHARDED, "tokenizer.json", *others) == sorted([*SHARDED, "tokenizer.json"])


def test_everything_of_a_tokenizer_is_part_of_the_model() -> None:
    """Also what only other programs read, since the result is published with it."""
    names = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
    more = ("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    assert chosen(*WHOLE, *names, *more) == sorted([*WHOLE, *names, *more])
    assert "tekken.json" in chosen("config.json", "model.safetensors", "tekken.json")


@pytest.mark.parametrize(
    ("names", "part"),
    [
        pytest.param(("adapter_config.json", "adapter_model.safetensors"), "is an adapter", id="an adapter"),
        pytest.param((*WHOLE, "adapter_config.json"), "adapter_config.json: a base model and an adapter", id="both"),
        pytest.param((*SHARDED, "model.safetensors"), "would load the first and ignore the index", id="stale single"),
        pytest.param(("config.json", "weights.safetensors"), "no library finds its weights (weights", id="other name"),
        pytest.param(("config.json", *SHARDS), "no library finds its weights", id="shards without an index"),
        pytest.param(("config.json", "pytorch_model.bin"), "only pickled weights (pytorch_model.bin)", id="pickles"),
        pytest.param(("config.json", "README.md"), "has no weights; it contains: README.md, config.json", id="none"),
        pytest.param(("model.safetensors",), "has no config.json; it contains: model.safetensors", id="no config"),
        pytest.param(("config.json", INDEX, SHARDS[0]), "model-2.safetensors is missing (1 of 2 files)", id="a shard"),
    ],
)
def test_what_may_be_taken_for_another_model_is_rejected(names: tuple[str, ...], part: str) -> None:
    """The message names the model and the files, and there is a remedy."""
    with pytest.raises(DataError) as caught:
        chosen(*names)
    assert part in str(caught.value)
    assert "org/m" in caught.value.message
    assert caught.value.remedy


def test_an_index_of_one_file_is_no_contradiction() -> None:
    """Some programs write an index for a model that fits in one file."""
    names = ("config.json", INDEX, "model.safetensors")
    assert chosen(*names, index=indexed("model.safetensors")) == sorted(names)


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(indexed("."), id="the folder itself"),
        pytest.param(indexed(".."), id="the folder above"),
        pytest.param(indexed("../other/model-1.safetensors"), id="outside"),
        pytest.param(indexed("/etc/model-1.safetensors"), id="absolute"),
        pytest.param(indexed("sub\\model-1.safetensors"), id="a backslash"),
        pytest.param(indexed("a/model-1.safetensors"), id="a folder"),
        pytest.param(indexed(".safetensors"), id="hidden"),
        pytest.param(indexed("pytorch_model.bin"), id="a pickle"),
        pytest.param(indexed("x\0.safetensors"), id="NUL"),
        pytest.param(indexed(5), id="a number"),
        pytest.param(indexed(["model-1.safetensors"]), id="a list"),
        pytest.param(indexed(), id="empty"),
        pytest.param(b'{"weight_map": ["model-1.safetensors"]}', id="list of files"),
        pytest.param(b'{"weight_map": {"a": "model-1.safetensors"}}', id="no metadata"),
        pytest.param(b'{"weight_map": {"a": "model-1.safetensors"}, "metadata": null}', id="null for metadata"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"\xff\xfe\xff", id="not text"),
        pytest.param(b'{"a":' * 100_000, id="nested"),
    ],
)
def test_a_damaged_index_is_named(index: bytes) -> None:
    """An index cannot lead out of the folder, and what is not an index is a data error that names it."""
    with pytest.raises(
        DataError, match=r"model\.safetensors\.index\.json of org/m (is (damaged|not)|has no object metadata)"
    ):
        chosen(*SHARDED, index=index)


@pytest.mark.parametrize(
    ("name", "size"), [("tokenizer.json", LARGEST), ("config.json", LARGEST_JSON), (INDEX, LARGEST_JSON)]
)
def test_sizes_are_bounded_before_anything_is_read(name: str, size: int) -> None:
    """A file that is larger than any model's is rejected by its size alone."""
    sizes = {**dict.fromkeys((*SHARDED, "tokenizer.json"), 10), name: size + 1}
    with pytest.raises(DataError, match=f"{name} of org/m has .* bytes, more than any model needs"):
        choose("org/m", sizes, lambda _: pytest.fail("it was read"))


@pytest.mark.parametrize("data", [b"5" * 5000, b"[" * 100_000, b"null", b"\x80", b'{"a": 1} {}', b""])
def test_what_is_not_a_json_object(data: bytes) -> None:
    """Numbers, nesting and bytes that JSON's reader gives up on are data errors like any other."""
    with pytest.raises(DataError, match=r"config\.json of m"):
        json_object(data, "config.json of m")


def test_a_folder_shows_the_list_and_nothing_else(tmp_path: Path) -> None:
    """Links under the names of the list; the same list has the same folder, also while it is made twice."""
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(name)
    listed = {"config.json": tmp_path / "a.json", "additional_chat_templates/x.jinja": tmp_path / "b.json"}
    folder = folder_of(listed, tmp_path / "inputs")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(listed)
    assert (folder / "config.json").read_text() == "a.json"
    assert folder_of(listed, tmp_path / "inputs") == folder
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == [folder.name]
    other = folder_of({"config.json": tmp_path / "b.json"}, tmp_path / "inputs")
    assert other != folder


STRAY = {
    "consolidated.safetensors": b"stale",
    "pytorch_model.bin": b"a pickle",
    "modeling_x.py": b"raise SystemExit",
    "tekken.json": b"{}",
    "checkpoint-1/model.safetensors": b"stale",
}


@pytest.fixture(params=["directory", "s3", "hub"])
def place(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts files where TUNE_MODEL may point to, and returns the address."""
    contents = {path.name: path.read_bytes() for path in tiny_model.iterdir()}

    def directory(files: dict[str, bytes]) -> str:
        root = tmp_path / "model"
        shutil.rmtree(root, ignore_errors=True)
        for name, data in {**contents, **files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return str(root)

    def s3(files: dict[str, bytes]) -> str:
        bucket = request.getfixturevalue("s3_env")
        for name, data in {**contents, **files}.items():
            boto3.client("s3").put_object(Bucket=bucket, Key=f"model/{name}", Body=data)
        return f"s3://{bucket}/model"

    if request.param != "hub":
        yield {"directory": directory, "s3": s3}[request.param]
        return
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve_hub({}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)

        def on_hub(files: dict[str, bytes]) -> str:
            hub.repositories["org/model"] = {**contents, **files}
            return "org/model"

        yield on_hub


@pytest.mark.process
@pytest.mark.parametrize("weights", [False, True])
def test_wherever_the_model_lies_its_files_are_the_same(place, tiny_model: Path, tmp_path: Path, weights: bool) -> None:
    """What is pulled, inspected and shown to the loaders is one list, from a directory, a prefix or a repository."""
    name = place(STRAY)
    sources = Sources(
        model=name, dataset=(), eval_dataset=(), chat_template="tokenizer", patience_seconds=1, hold_out=False
    )
    pulled = Puller.of(sources, scratch=tmp_path / "scratch", pinned=None, weights=weights).model(name)
    expected = {path.name for path in tiny_model.iterdir()}
    shown = {path.relative_to(pulled.path).as_posix() for path in pulled.path.rglob("*") if path.is_file()}
    assert shown == expected
    assert {file.name.rpartition("/")[2] for file in pulled.files} == expected
    assert {path.name for path in inspect(pulled.path, name=name).weights} <= expected
    assert {path.stat().st_size for path in pulled.path.glob("*.safetensors")} == {
        path.stat().st_size for path in tiny_model.glob("*.safetensors")
    }


@pytest.mark.process
@pytest.mark.parametrize("stray", ["model.safetensors", "adapter_config.json"])
def test_wherever_the_model_lies_the_same_is_rejected(place, tmp_path: Path, stray: str) -> None:
    """An older file of weights and an adapter's files are named before any weights are downloaded."""
    name = place({stray: b"{}"})
    sources = Sources(
        model=name, dataset=(), eval_dataset=(), chat_template="tokenizer", patience_seconds=1, hold_out=False
    )
    with pytest.raises(DataError, match=stray):
        Puller.of(sources, scratch=tmp_path / "scratch", pinned=None, weights=False).model(name)


@pytest.mark.process
def test_what_an_earlier_run_downloaded_is_not_the_model(s3_env: str, tiny_model: Path, tmp_path: Path) -> None:
    """The scratch directory keeps downloads: a file that is gone from the prefix since is not shown to the loaders."""
    client, name = boto3.client("s3"), f"s3://{s3_env}/model"
    sources = Sources(
        model=name, dataset=(), eval_dataset=(), chat_template="tokenizer", patience_seconds=1, hold_out=False
    )
    puller = Puller.of(sources, scratch=tmp_path / "scratch", pinned=None)
    for path in (tiny_model / "config.json", min(tiny_model.glob("*.safetensors"))):
        key = "model.safetensors" if path.suffix == ".safetensors" else path.name
        client.put_object(Bucket=s3_env, Key=f"model/{key}", Body=path.read_bytes())
    puller.model(name)
    client.delete_object(Bucket=s3_env, Key="model/model.safetensors")
    for path in tiny_model.iterdir():
        client.put_object(Bucket=s3_env, Key=f"model/{path.name}", Body=path.read_bytes())
    pulled = puller.model(name)
    assert {path.name for path in pulled.path.iterdir()} == {path.name for path in tiny_model.iterdir()}
