"""The process that downloads from the hub: a request as its argument, lines of JSON out, the last one the outcome.

It is online where the user may be, and ends when its standard input closes: it does not outlive its parent.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from job.inputs import safetensors_stub
from job.inputs.hub_files import MODEL_FILES, Request, data_files, model_files
from job.runtime.errors import JobError, StorageError

PROGRESS_SECONDS = 5.0


def _main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = Request(**json.loads(sys.argv[1]))
    try:
        outcome: dict[str, Any] = {"fetched": _download(request)}
    except JobError as error:
        outcome = {"kind": error.kind, "message": error.message, "remedy": error.remedy}
    except Exception as error:  # noqa: BLE001 - the parent decides
        outcome = _explained(request, error)
    _say(outcome)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _download(request: Request) -> dict[str, Any]:
    kind, repo, directory = request.kind, request.repo, request.directory
    if constants.HF_HUB_OFFLINE:
        return _from_cache(request)
    info = HfApi().repo_info(repo, repo_type=kind, revision=request.revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    files = model_files(repo, list(sizes)) if kind == "model" else _dataset_files(request, info.sha, list(sizes))
    skimmed = [] if request.weights else [name for name in files if name.endswith(safetensors_stub.SUFFIX)]
    whole = [name for name in files if name not in skimmed]
    _require_free(directory, sum(sizes[name] for name in whole))
    for name in skimmed:
        safetensors_stub.write_stub(Path(directory, name), sizes[name], functools.partial(_start, repo, info.sha, name))
    with _progress(request, whole, sum(sizes[name] for name in whole)):
        # The names are escaped because they are patterns here; the commit spares another look at the branch.
        patterns = [glob.escape(name) for name in whole]
        snapshot_download(repo, repo_type=kind, revision=info.sha, local_dir=directory, allow_patterns=patterns)
    for name in files:
        if not Path(directory, name).is_file() or Path(directory, name).stat().st_size != sizes[name]:
            raise StorageError(f"{repo}: {name} did not arrive whole.", remedy="Run again.")
    return {"path": directory, "name": repo, "commit": info.sha, "files": sorted(files)}


def _start(repo: str, commit: str, name: str, size: int) -> bytes:
    """The first bytes of a file; no more than those, also from a server that knows no ranges."""
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


def _from_cache(request: Request) -> dict[str, Any]:
    """What the user's own cache holds: `HF_HUB_OFFLINE` was set by the user."""
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
        files = model_files(request.repo, names)
    else:
        readme = place / "README.md"
        files = data_files(request.repo, request.split, names, _text(readme) if readme.is_file() else "")
    return {"path": str(place), "name": request.repo, "commit": place.name, "files": sorted(files)}


def _require_free(directory: str, size: int) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    if size > shutil.disk_usage(directory).free:
        raise StorageError(f"{size} bytes do not fit into {directory}.", remedy="Give that volume more space.")


@contextlib.contextmanager
def _progress(request: Request, files: list[str], total: int) -> Iterator[None]:
    """Tell every few seconds how much has await_model, finished or not."""
    over, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(PROGRESS_SECONDS):
            done = min(total, _bytes_below(Path(request.directory), files))
            speed = done / (time.monotonic() - start)
            _say(
                {
                    "progress": {
                        "uri": f"hf://{request.kind}s/{request.repo}",
                        "direction": "download",
                        "bytes_done": done,
                        "bytes_total": total,
                        "bytes_per_second": round(speed),
                        "eta_seconds": round((total - done) / speed, 1) if speed else None,
                    }
                }
            )

    thread = threading.Thread(target=tell, daemon=True)
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


def _dataset_files(request: Request, commit: str, names: list[str]) -> list[str]:
    readme = ""
    if "README.md" in names:
        place = request.directory
        readme = _text(
            hf_hub_download(request.repo, "README.md", repo_type="dataset", revision=commit, local_dir=place)
        )
    return data_files(request.repo, request.split, names, readme)


def _text(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _explained(request: Request, error: Exception) -> dict[str, Any]:
    page = f"{constants.ENDPOINT}/{'datasets/' if request.kind == 'dataset' else ''}{request.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = f"{request.repo} at {page}"
    if isinstance(error, errors.GatedRepoError):
        return _denied(f"{told} is gated (HTTP {status})", f"Accept its licence at {page} with the token's account")
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"{request.repo} has no revision {request.revision!r}."
        return {"kind": "data", "message": message, "remedy": f"Look at {page}/tree/main."}
    if status in {401, 403} or isinstance(error, errors.DisabledRepoError):
        return _denied(f"{told} was refused (HTTP {status}): it does not exist or is private", "Correct its name")
    if isinstance(error, errors.RepositoryNotFoundError):
        return {"kind": "data", "message": f"{told} does not exist. {_token()}", "remedy": "Correct its name."}
    if isinstance(error, errors.HFValidationError):
        return {"kind": "data", "message": f"{told}: {error}.", "remedy": "Correct its name."}
    return {"kind": "unreachable", "message": f"{type(error).__name__}: {error}"[:500]}


def _denied(what: str, remedy: str) -> dict[str, str]:
    return {"kind": "denied", "message": f"{what}. {_token()}", "remedy": f"{remedy}, or set HF_TOKEN to one."}


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
    _main()
