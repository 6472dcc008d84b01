"""Manifests from the real engines: Helm as a library, kustomize inside kubectl. Offline, no cluster."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import kubernetes_validate.utils as schemas
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "finetune-job"
KUBECTL = Path(sys.executable).with_name("kubectl")
OLDEST = (1, 29)
VERSIONS = [v for v in schemas.all_versions() if tuple(map(int, v.split(".")[:2])) >= OLDEST]
SCHEMALESS = ("PodMonitor",)  # the Prometheus operator's, not Kubernetes' own
REQUIRED = {"TUNE_MODEL": "org/name", "TUNE_DATASET": "s3://bucket/rows.jsonl", "TUNE_OUTPUT": "s3://bucket/runs"}

# The schemas are read again at every validation, 5 MB each time.
schemas.schema_contents = functools.cache(schemas.schema_contents)


@functools.cache
def chart() -> helm.Chart:
    """The chart, loaded once."""
    return helm.Chart.load(CHART)


def values(config: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Values with the required settings and these."""
    return {"config": {**REQUIRED, **(config or {})}, **more}


def files(given: dict[str, Any], *, name: str = "demo", namespace: str = "ml") -> dict[str, str]:
    """What Helm renders, by file name."""
    return {Path(path).name: text for path, text in chart().render(given, name=name, namespace=namespace).items()}


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document]


def render(given: dict[str, Any], *, name: str = "demo", namespace: str = "ml") -> list[dict[str, Any]]:
    """The objects that Helm renders."""
    rendered = files(given, name=name, namespace=namespace)
    return [document for path, text in rendered.items() if path.endswith(".yaml") for document in documents(text)]


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def job_spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The Job's spec, alone or inside a CronJob."""
    (owner,) = [item for item in objects if item["kind"] in ("Job", "CronJob")]
    return owner["spec"]["jobTemplate"]["spec"] if owner["kind"] == "CronJob" else owner["spec"]


def pod_specs(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod's spec: the Job's and the pre-flight test's."""
    return [job_spec(objects)["template"]["spec"], *(item["spec"] for item in objects if item["kind"] == "Pod")]


def environment(objects: list[dict[str, Any]]) -> dict[str, str | None]:
    """The Job's variables; None where the value comes from the pod's own fields."""
    (container,) = job_spec(objects)["template"]["spec"]["containers"]
    return {item["name"]: item.get("value") for item in container["env"]}


def validate(objects: list[dict[str, Any]], versions: list[str]) -> None:
    """Check objects strictly against Kubernetes' own schemas.

    Raises:
        kubernetes_validate.ValidationError: if a field is unknown or of the wrong type.
    """
    for item in objects:
        for version in versions:
            if item["kind"] not in SCHEMALESS:
                kubernetes_validate.validate(item, version, strict=True)


def kustomize(directory: Path) -> list[dict[str, Any]]:
    """The objects that kustomize builds from a directory."""
    command = [KUBECTL, "kustomize", directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # a deprecated field is a warning there
    return documents(done.stdout)
