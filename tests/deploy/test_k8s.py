"""`k8s/`, built by kustomize itself (inside kubectl): the same objects as the chart's."""

import shutil

import pytest
import yaml

from tests import kustomize, manifests
from tests.kustomize import CRON, K8S, comparable
from tests.manifests import render, values

pytestmark = pytest.mark.process

OVERLAYS = ("base", "overlays/single-gpu", "overlays/cron")
ENDPOINT = {"s3": {"endpoint": "https://minio.example:9000", "region": "us-east-1"}, "existingSecrets": ["finetune-s3"]}
ROLE = {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/finetune"}
COMPONENTS = {
    "nvidia-gpu": {"runtimeClassName": "nvidia", "nodeSelector": {"nvidia.com/gpu.present": "true"}},
    "spot-gke": {"spot": {"enabled": True, "provider": "gke"}},
    "spot-karpenter": {"spot": {"enabled": True, "provider": "karpenter"}},
    "spot-aks": {"spot": {"enabled": True, "provider": "aks"}},
    "kueue": {"kueue": {"queueName": "gpu-queue"}},
    "irsa": {"serviceAccount": {"annotations": ROLE}},
    "s3-endpoint": ENDPOINT,
}


@pytest.mark.parametrize("path", kustomize.generated(), ids=lambda path: path.name)
def test_generated_files_are_what_the_chart_renders(path):
    """The Job, its account and the CronJob are as the generator takes them from the chart: `make chart-schema`."""
    assert kustomize.generated()[path] == path.read_text()


@pytest.mark.parametrize("name", OVERLAYS)
def test_builds_and_is_valid(name):
    """kustomize builds each directory without a warning, and each object is valid in every version from 1.29 on."""
    objects = manifests.kustomize(K8S / name)
    assert {item["kind"] for item in objects} == {"ServiceAccount", "CronJob" if "cron" in name else "Job"}
    manifests.validate(objects, manifests.VERSIONS)


def test_base_is_the_chart():
    """The base is what the chart renders by default, less what only Helm gives and the settings that are required."""
    assert comparable(manifests.kustomize(K8S / "base")) == comparable(render(values(), name=kustomize.NAME))


@pytest.mark.parametrize("mode", ["base", "overlays/cron"], ids=["job", "cronjob"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_is_the_charts_value(component, mode, tmp_path):
    """The base or the schedule with a component is what the chart renders with the value of that name."""
    shutil.copytree(K8S, tmp_path / "k8s")
    lines = {"resources": [f"k8s/{mode}"], "components": [f"k8s/components/{component}"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    image = {"image": {"repository": "registry.example/finetune-job"}} if mode != "base" else {}
    given = values(**COMPONENTS[component], **image, **(CRON if mode != "base" else {}))
    built = manifests.kustomize(tmp_path)
    manifests.validate(built, manifests.VERSIONS[-1:])
    assert comparable(built) == comparable(render(given, name=kustomize.NAME))


def test_every_component_is_compared():
    """No component exists that is not compared with the chart."""
    assert {path.name for path in (K8S / "components").iterdir()} == set(COMPONENTS)


@pytest.mark.parametrize("name", OVERLAYS[1:])
def test_overlays_bring_what_the_base_lacks(name):
    """An overlay sets the image and the three required settings, and nothing else."""
    overlay = manifests.kustomize(K8S / name)
    assert set(manifests.REQUIRED) <= set(manifests.environment(overlay))
    image = {"image": {"repository": "registry.example/finetune-job"}}
    given = values(**image, **(CRON if "cron" in name else {}))
    assert comparable(overlay) == comparable(render(given, name=kustomize.NAME))
