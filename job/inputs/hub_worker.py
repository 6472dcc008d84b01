"""The process that downloads from the hub, at the request of `job.inputs.hub`: one request, one answer.

It is online where the user may be, and ends with its parent.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import threading
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from job.inputs import hub_failures, model_files, safetensors_stub
from job.inputs.data_files import HUB, Choice, choose
from job.inputs.dataset_card import LONGEST, README, declared_splits
from job.inputs.hub import Downloaded, Request
from job.runtime.child import Message, Parent, serve
from job.runtime.errors import StorageError
from job.storage.disk import require_free
from job.storage.fetch import resolve
from job.storage.progress import Progress

POLL_SECONDS = 1.0


def program(parent: Parent) -> None:
    """Answer one request."""
    request = parent.receive(Request)
    try:
        hub_failures.check_ca()
        answer: Message = _download(request)
    except Exception as error:  # noqa: BLE001 - the parent decides
        answer = hub_failures.answer(request, error)
    parent.send(answer)


def _download(request: Request) -> Downloaded:
    kind, repo, directory = request.kind, request.repo, Path(request.directory)
    if constants.HF_HUB_OFFLINE:
        return _from_cache(request)
    info = HfApi().repo_info(repo, repo_type=kind, revision=request.revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    if kind == "model":
        chosen = Choice(files=tuple(_model_files(request, info.sha, sizes)))
    else:
        chosen = _dataset_files(request, info.sha, [*sizes])
    files = [*chosen.files, *chosen.held_out]
    stubs = [] if request.weights else [name for name in files if name.endswith(model_files.SUFFIX)]
    complete = [name for name in files if name not in stubs]
    total = sum(sizes[name] for name in complete)
    directory.mkdir(parents=True, exist_ok=True)
    require_free(directory, total)
    for name in stubs:
        read = functools.partial(_read_start, repo, info.sha, name)
        safetensors_stub.write_stub(directory / name, sizes[name], read)
    with _progress(request, complete, total):
        # Escaped, because the names are patterns here. The commit, so that the branch is not looked up again.
        patterns = [glob.escape(name) for name in complete]
        snapshot_download(repo, repo_type=kind, revision=info.sha, local_dir=directory, allow_patterns=patterns)
    for name in files:
        if not (directory / name).is_file() or (directory / name).stat().st_size != sizes[name]:
            raise StorageError(f"{repo}: {name} was not downloaded completely.", remedy="Run again.")
    return _downloaded(directory, info.sha, chosen)


def _downloaded(directory: Path, commit: str, chosen: Choice) -> Downloaded:
    return Downloaded(
        path=str(directory),
        commit=commit,
        files=sorted(chosen.files),
        held_out=sorted(chosen.held_out),
        left_out=[[one.name, one.reason] for one in chosen.left_out],
    )


def _read_start(repo: str, commit: str, name: str, size: int) -> bytes:
    """The first bytes of a file; no more than those, also from a server that ignores ranges."""
    request = {"Range": f"bytes=0-{size - 1}", **build_hf_headers()}
    url = hf_hub_url(repo, name, revision=commit)
    found = b""
    with get_session().stream("GET", url, headers=request, follow_redirects=True) as reply:
        hf_raise_for_status(reply)
        for part in reply.iter_raw():
            found += part
            if len(found) >= size:
                break
    return found[:size]


def _from_cache(request: Request) -> Downloaded:
    """The files in the user's own cache: `HF_HUB_OFFLINE` was set by the user."""
    try:
        place = Path(snapshot_download(request.repo, repo_type=request.kind, revision=request.revision))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"HF_HUB_OFFLINE is set and the local cache does not hold {request.repo}.",
            remedy="Unset it, or give the address of a copy in S3 or on disk.",
        ) from error
    sizes = {entry.key: entry.size for entry in resolve(str(place), patience_seconds=0).entries}
    names = list(sizes)
    if request.kind == "model":
        files = model_files.choose(request.repo, sizes, lambda name: (place / name).read_bytes())
        return _downloaded(place, place.name, Choice(files=tuple(files)))
    return _downloaded(place, place.name, _chosen(request, names, place / README if README in names else None))


@contextlib.contextmanager
def _progress(request: Request, files: list[str], total: int) -> Iterator[None]:
    """Report every few seconds how much has been downloaded, counting files that are not complete yet."""
    over, progress = threading.Event(), Progress(f"hf://{request.kind}s/{request.repo}", "download", total)

    def count() -> None:
        counted = 0
        while not over.wait(POLL_SECONDS):
            done = min(total, _bytes_below(Path(request.directory), files))
            progress.add(done - counted)
            counted = done

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bytes_below(directory: Path, files: list[str]) -> int:
    unfinished = (directory / ".cache").rglob("*.incomplete")
    sizes = 0
    for path in [*(directory / name for name in files), *unfinished]:
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size
    return sizes


def _model_files(request: Request, commit: str, sizes: dict[str, int]) -> list[str]:
    def read(name: str) -> bytes:
        place = request.directory
        return Path(hf_hub_download(request.repo, name, revision=commit, local_dir=place)).read_bytes()

    return model_files.choose(request.repo, sizes, read)


def _dataset_files(request: Request, commit: str, names: list[str]) -> Choice:
    if README not in names:
        return _chosen(request, names, None)
    place = request.directory
    readme = hf_hub_download(request.repo, README, repo_type="dataset", revision=commit, local_dir=place)
    return _chosen(request, names, Path(readme))


def _chosen(request: Request, names: list[str], readme: Path | None) -> Choice:
    place, text = f"{HUB}{request.repo}", b""
    if readme is not None:
        with readme.open("rb") as file:
            text = file.read(LONGEST)
    declared = declared_splits(place, text, names)
    return choose(place, names, side=request.side, hold_out=request.hold_out, split=request.split, declared=declared)


if __name__ == "__main__":
    serve(program)
