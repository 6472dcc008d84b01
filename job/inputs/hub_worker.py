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

from huggingface_hub import HfApi, constants, errors, get_token, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from job.inputs import safetensors_stub
from job.inputs.data_files import Choice
from job.inputs.dataset_card import README
from job.inputs.hub import Downloaded, Request, Unreachable
from job.inputs.hub_files import MODEL_FILES, data_files, model_files
from job.runtime.child import Failed, Message, Parent, serve
from job.runtime.credentials import shown
from job.runtime.errors import AccessDeniedError, DataError, JobError, StorageError, known
from job.storage.disk import require_free
from job.storage.progress import Progress

POLL_SECONDS = 1.0


def program(parent: Parent) -> None:
    """Answer one request."""
    request = parent.receive(Request)
    try:
        answer: Message = _download(request)
    except Exception as error:  # noqa: BLE001 - the parent decides
        failure = known(error) or _failure(request, error)
        answer = Failed.of(failure) if failure else Unreachable(reason=shown(f"{type(error).__name__}: {error}")[:500])
    parent.send(answer)


def _download(request: Request) -> Downloaded:
    kind, repo, directory = request.kind, request.repo, Path(request.directory)
    if constants.HF_HUB_OFFLINE:
        return _from_cache(request)
    info = HfApi().repo_info(repo, repo_type=kind, revision=request.revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    if kind == "model":
        chosen = Choice(files=tuple(model_files(repo, list(sizes))))
    else:
        chosen = _dataset_files(request, info.sha, list(sizes))
    files = [*chosen.files, *chosen.held_out]
    stubs = [] if request.weights else [name for name in files if name.endswith(safetensors_stub.SUFFIX)]
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
    patterns = list(MODEL_FILES) if request.kind == "model" else None
    try:
        place = Path(
            snapshot_download(request.repo, repo_type=request.kind, revision=request.revision, allow_patterns=patterns)
        )
    except (OSError, ValueError) as error:
        raise StorageError(
            f"HF_HUB_OFFLINE is set and the local cache does not hold {request.repo}.",
            remedy="Unset it, or give the address of a copy in S3 or on disk.",
        ) from error
    names = [path.relative_to(place).as_posix() for path in sorted(place.rglob("*")) if path.is_file()]
    if request.kind == "model":
        return _downloaded(place, place.name, Choice(files=tuple(model_files(request.repo, names))))
    readme = place / README
    return _downloaded(place, place.name, _data_files(request, names, _text(readme) if readme.is_file() else ""))


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


def _dataset_files(request: Request, commit: str, names: list[str]) -> Choice:
    readme = ""
    if README in names:
        place = request.directory
        readme = _text(hf_hub_download(request.repo, README, repo_type="dataset", revision=commit, local_dir=place))
    return _data_files(request, names, readme)


def _data_files(request: Request, names: list[str], readme: str) -> Choice:
    return data_files(request.repo, request.split, names, readme, side=request.side, hold_out=request.hold_out)


def _text(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _failure(request: Request, error: Exception) -> JobError | None:
    """What the hub's answer means; None where it may be another one soon."""
    page = f"{constants.ENDPOINT}/{'datasets/' if request.kind == 'dataset' else ''}{request.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    where = f"{request.repo} at {page}"
    if isinstance(error, errors.GatedRepoError):
        return AccessDeniedError(
            f"{where} is gated (HTTP {status}). {_token()}",
            remedy=f"Accept its licence at {page} with the token's account, or set HF_TOKEN to one that has access.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(
            f"{request.repo} has no revision {request.revision!r}.", remedy=f"{page}/tree/main shows those it has."
        )
    if status in {401, 403} or isinstance(error, errors.DisabledRepoError):
        return AccessDeniedError(
            f"{where} was denied (HTTP {status}): it does not exist or is private. {_token()}",
            remedy="Correct its name, or set HF_TOKEN to one that has access.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DataError(f"{where} does not exist. {_token()}", remedy="Correct its name.")
    if isinstance(error, errors.HFValidationError):
        return DataError(f"{where} does not have a valid name: {error}.", remedy="Correct its name.")
    return None


def _token() -> str:
    """Which token was found, without its value."""
    token, file = get_token(), Path(constants.HF_TOKEN_PATH)
    if token is None:
        return f"No token was found: looked at HF_TOKEN and {file}."
    with contextlib.suppress(OSError):
        if file.read_text(encoding="utf-8").strip() == token:
            return f"The token in {file} was used."
    return "The token in HF_TOKEN was used."


if __name__ == "__main__":
    serve(program)
