"""What `k8s/` takes from the chart: the Job, its service account and the CronJob, rendered and stripped of Helm.

A Job there has a plain name, since kustomize cannot hash a spec, and no TUNE_RUN_ID: without one the job itself takes a
hash of the variables that decide the result, which is what the chart does. The required variables come from an overlay.
"""

import re
from pathlib import Path
from typing import Any

from tests import manifests

K8S = manifests.ROOT / "k8s"
NAME = "finetune-job"
HELM_LABELS = ("app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart")
HEADER = "# Written by make chart-schema from helm/finetune-job. Change it with patches, not here.\n"
CRON = {"mode": "cronjob", "cron": {"schedule": "0 3 * * 0"}}


def generated() -> dict[Path, str]:
    """Every generated file of `k8s/` and its text."""
    job, cron = (manifests.files(manifests.values(**more), name=NAME) for more in ({}, CRON))
    return {
        K8S / "base" / "job.yaml": stripped(job["job.yaml"]),
        K8S / "base" / "serviceaccount.yaml": stripped(job["serviceaccount.yaml"]),
        K8S / "overlays" / "cron" / "cronjob.yaml": stripped(cron["cronjob.yaml"]),
    }


def stripped(text: str) -> str:
    """The text without what only Helm can give; its comments stay."""
    lines = [
        line
        for line in text.splitlines()
        if line.strip() and not line.startswith("  namespace:") and not line.strip().startswith(HELM_LABELS)
    ]
    text = "\n".join(lines) + "\n"
    for name in ("TUNE_RUN_ID", *manifests.REQUIRED):
        text = re.sub(rf"( *)- name: {name}\n\1  value: .*\n", "", text)
    return HEADER + re.sub(rf"^  name: {NAME}-[0-9a-f]{{8}}$", f"  name: {NAME}", text, flags=re.MULTILINE)


def comparable(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Objects by kind without what only Helm gives (labels, the hash, the test pod), variables by name."""
    found = {}
    for item in objects:
        if item["kind"] == "Pod":
            continue
        found[item["kind"]] = item
        metadata = [item["metadata"]]
        if item["kind"] == "CronJob":
            metadata.append(item["spec"]["jobTemplate"]["metadata"])
        for part in metadata:
            part.pop("namespace", None)
            for label in HELM_LABELS:
                part["labels"].pop(label, None)
        item["metadata"]["name"] = NAME
        if item["kind"] in ("Job", "CronJob"):
            (container,) = manifests.job_spec([item])["template"]["spec"]["containers"]
            variables = {entry.pop("name"): entry for entry in container["env"]}
            dropped = [name for name in variables if name in manifests.REQUIRED]
            dropped += [name for name in variables if name == "TUNE_RUN_ID" and "value" in variables[name]]
            container["env"] = {name: value for name, value in variables.items() if name not in dropped}
    return found
