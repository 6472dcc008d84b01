"""The chart as a dependency of another one, which may leave it out, name it anew, or have it more than once."""

import shutil

import helm_python as helm
import pytest
import yaml

from tests import manifests
from tests.manifests import CHART, documents, values

VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]


@pytest.fixture
def parent(tmp_path):
    """Renders a chart that depends on this one under these aliases (None: under its own name)."""

    def render(given, *aliases, name="demo"):
        directory = tmp_path / "platform"
        dependencies = [
            {
                "name": "finetune-job",
                "version": VERSION,
                "condition": f"{alias or 'finetune-job'}.enabled",
                **({"alias": alias} if alias else {}),
            }
            for alias in aliases
        ]
        shutil.copytree(CHART, directory / "charts" / "finetune-job", dirs_exist_ok=True)
        head = {"apiVersion": "v2", "name": "platform", "version": "1.0.0", "dependencies": dependencies}
        (directory / "Chart.yaml").write_text(yaml.safe_dump(head))
        (directory / "templates").mkdir(exist_ok=True)
        (directory / "values.yaml").write_text(yaml.safe_dump({"global": {"region": "eu"}}))
        assert helm.lint(directory, given, strict=True)["errors"] == []
        found = helm.Chart.load(directory).render(given, name=name, namespace="ml")
        return [item for path, text in found.items() if path.endswith(".yaml") for item in documents(text)]

    return render


@pytest.mark.parametrize("enabled", [True, False])
def test_an_optional_dependency(parent, enabled):
    """`enabled`, which the parent's condition reads, reaches the chart as well; false leaves it out."""
    found = parent({"finetune-job": values(enabled=enabled)}, None)
    assert ({item["kind"] for item in found} >= {"Job", "ServiceAccount"}) is enabled
    assert bool(found) is enabled
    manifests.validate(found, manifests.VERSIONS[-1:])


@pytest.mark.parametrize("shared", [{}, {"imageRegistry": "r.example", "nested": {"a": [1]}}, None])
def test_what_all_charts_share(parent, shared):
    """`global` may hold anything."""
    assert parent({"global": shared, "finetune-job": values()}, None)


def test_twice_in_one_release(parent):
    """Under two aliases there are two runs: other names, other run ids, and selectors that do not meet."""
    one, two = {"TUNE_SEED": 1}, {"TUNE_SEED": 2}
    metrics = {"metrics": {"enabled": True, "podMonitor": {"enabled": True}}}
    found = parent({"support": values(one, **metrics), "sales": values(two, **metrics)}, "support", "sales")
    names = [(item["kind"], item["metadata"]["name"]) for item in found]
    assert len(names) == len(set(names))
    jobs = [item for item in found if item["kind"] == "Job"]
    ids = {manifests.environment([job])["TUNE_RUN_ID"].rpartition("-")[0] for job in jobs}
    assert ids == {"demo-support", "demo-sales"}
    instances = [job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/instance"] for job in jobs]
    assert sorted(instances) == ["demo-sales", "demo-support"]
    selected = [
        item["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"]
        for item in found
        if item["kind"] == "PodMonitor"
    ]
    assert sorted(selected) == ["demo-sales", "demo-support"]


def test_long_names(parent):
    """A long release and a long alias give names that Kubernetes takes, and that differ."""
    name, aliases = "r" * 53, ("a" * 40, "a" * 41)
    found = parent({alias: values() for alias in aliases}, *aliases, name=name)
    manifests.validate(found, manifests.VERSIONS[-1:])
    names = [(item["kind"], item["metadata"]["name"]) for item in found]
    assert len(names) == len(set(names))
    assert all(len(name) <= 63 for _, name in names)
    assert all(len(value) <= 63 for item in found for value in item["metadata"]["labels"].values())
