"""The chart, rendered by Helm itself: its generated parts, every mode, and how it names Jobs and runs."""

import json
import re
import shutil
import tomllib

import helm_python as helm
import pytest
import yaml

from job.config import environment as env
from job.config.field import PREFIX
from job.config.schema import SETTINGS
from tests import chart, manifests
from tests.manifests import CHART, ROOT, environment, job_spec, only, render, values

CI = sorted((CHART / "ci").glob("*-values.yaml"))
each_ci = pytest.mark.parametrize("path", CI, ids=[path.name.removesuffix("-values.yaml") for path in CI])
CRON = {"mode": "cronjob", "cron": {"schedule": "@daily"}}


def ci_values(path):
    """A file of values as Helm reads it."""
    return helm.values_from_yaml(path.read_text())


@pytest.mark.parametrize("path", chart.chart_files(), ids=lambda path: path.name)
def test_generated_parts_are_what_the_code_says(path):
    """Schema, variables and README are as the generator writes them: `make chart-schema`."""
    assert chart.chart_files()[path] == path.read_text()


def test_versions_agree():
    """The chart's appVersion is the package's version, which is the image's default tag."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == chart_metadata()["appVersion"]
    (container,) = job_spec(render(values()))["template"]["spec"]["containers"]
    assert container["image"] == f"finetune-job:{version}"


def chart_metadata():
    return yaml.safe_load((CHART / "Chart.yaml").read_text())


def test_every_value_is_in_the_schema_and_explained():
    """Values, schema and table name the same things, and no value lacks its comment."""
    explained = {path for path, _, _ in chart.values_rows((CHART / "values.yaml").read_text())}
    schema = json.loads((CHART / "values.schema.json").read_text())

    def leaves(node, place=""):
        for name, inner in node["properties"].items():
            path = f"{place}{name}"
            if "properties" in inner and path not in ("config", "podSecurityContext"):
                yield from leaves(inner, f"{path}.")
            elif path not in ("global", "enabled"):  # Helm's own, for charts inside charts
                yield path

    defaults = manifests.chart().values
    groups = {path for path in explained if isinstance(_at(defaults, path), dict) and _at(defaults, path)}
    assert set(leaves(schema)) == explained - (groups - {"resources", "podSecurityContext"}) - {"resources"} | {
        "resources.requests",
        "resources.limits",
    }


def _at(tree, path):
    for key in path.split("."):
        tree = tree[key]
    return tree


def test_lint_without_values():
    """A strict lint of the chart as it is finds nothing."""
    assert helm.lint(CHART, strict=True)["errors"] == []


@each_ci
def test_every_mode_lints_and_is_valid(path):
    """Each file of values lints strictly, and each object is valid in every Kubernetes version from 1.29 on."""
    given = ci_values(path)
    assert helm.lint(CHART, given, strict=True)["errors"] == []
    objects = render(given)
    assert {item["kind"] for item in objects} >= {"Pod", "CronJob" if given.get("mode") == "cronjob" else "Job"}
    assert {item["metadata"]["namespace"] for item in objects} == {"ml"}
    manifests.validate(objects, manifests.VERSIONS)


def test_the_package_renders_the_same(tmp_path):
    """What `helm package` puts into the archive is all that rendering needs."""
    packaged = helm.Chart.load(helm.package(CHART, destination=tmp_path))
    given = ci_values(CI[0])
    assert packaged.render(given, name="demo", namespace="ml") == manifests.chart().render(
        given, name="demo", namespace="ml"
    )


def test_validation_is_strict():
    """The validation that the manifests pass refuses a field that Kubernetes does not know."""
    job = only(render(values()), "Job")
    job["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    with pytest.raises(manifests.kubernetes_validate.ValidationError, match="restartpolicy"):
        manifests.validate([job], manifests.VERSIONS[-1:])


@each_ci
def test_the_job_accepts_what_the_chart_passes(path, monkeypatch, tmp_path):
    """The job's own parser reads the rendered variables, and every setting arrives with the value that YAML had."""
    given = ci_values(path)
    variables = {name: value for name, value in environment(render(given)).items() if name.startswith(PREFIX)}
    known = {setting.variable for setting in SETTINGS}
    assert {name.removesuffix("_FILE") for name in variables} <= known
    for name, value in variables.items():
        if name.endswith("_FILE"):
            (tmp_path / "value").write_text("from-a-file\n")
            monkeypatch.setenv(name, str(tmp_path / "value"))
        elif name in known:
            monkeypatch.setenv(name, value or "job-of-the-schedule")
    config = env.load().as_variables()
    for name, value in given["config"].items():
        if value is not None and name in known:
            expected = {True: "on", False: "off"}[value] if name == "TUNE_GRADIENT_CHECKPOINTING" else value
            actual = list(config[name]) if isinstance(value, list) else config[name]
            assert actual == expected or str(actual) == str(expected) or actual == (expected,)


SAME, OTHER = True, False


@pytest.mark.parametrize(
    ("config", "more", "name", "run"),
    [
        pytest.param({}, {}, SAME, SAME, id="nothing"),
        pytest.param({"TUNE_LEARNING_RATE": 1e-4}, {}, OTHER, OTHER, id="learning rate"),
        pytest.param({"TUNE_DATASET": "s3://bucket/other"}, {}, OTHER, OTHER, id="data"),
        pytest.param({"TUNE_LORA_R": 16}, {}, OTHER, SAME, id="a default written out is the same run"),
        pytest.param({"TUNE_ALLOW_CHANGE": "tokenizer"}, {}, OTHER, SAME, id="allow change"),
        pytest.param({"TUNE_OUTPUT": "s3://bucket/other"}, {}, OTHER, SAME, id="output"),
        pytest.param({"TUNE_LOG_LEVEL": "debug"}, {}, OTHER, SAME, id="log level"),
        pytest.param({}, {"resources": {"limits": {"memory": "64Gi"}}}, OTHER, SAME, id="memory"),
        pytest.param({}, {"image": {"tag": "0.2.0"}}, OTHER, SAME, id="image"),
        pytest.param({}, {"existingSecrets": ["s3"]}, OTHER, SAME, id="secret"),
        pytest.param({}, {"kueue": {"queueName": "gpus"}}, OTHER, SAME, id="queue"),
        pytest.param({}, {"keepOnUpgrade": True}, SAME, SAME, id="keep"),
        pytest.param({}, {"serviceAccount": {"annotations": {"a": "b"}}}, SAME, SAME, id="role"),
        pytest.param({}, {"cron": {"suspend": True}}, SAME, SAME, id="values of the other mode"),
    ],
)
def test_what_makes_another_job_and_another_run(config, more, name, run):
    """A change of the spec makes another Job, no change makes none; only what decides the result makes another run."""
    before, after = render(values()), render(values(config, **more))
    assert (only(before, "Job")["metadata"]["name"] == only(after, "Job")["metadata"]["name"]) is name
    assert (environment(before)["TUNE_RUN_ID"] == environment(after)["TUNE_RUN_ID"]) is run


@pytest.mark.parametrize(("one", "two"), [(3, "3"), (2e-4, "2e-4"), (0.0002, "0.0002"), (1, 1.0)])
def test_one_value_in_two_notations_is_one_run(one, two):
    """The run id does not depend on how a number is written."""
    runs = [environment(render(values({"TUNE_WARMUP": value})))["TUNE_RUN_ID"] for value in (one, two)]
    assert runs[0] == runs[1]


def test_upgrade_without_a_change_makes_no_new_job():
    """Neither the revision nor being an upgrade changes the Job."""
    renders = [
        manifests.chart().render(values(), name="demo", namespace="ml", revision=revision, is_upgrade=revision > 1)
        for revision in (1, 7)
    ]
    assert renders[0] == renders[1]


def test_run_id_of_the_user():
    """A TUNE_RUN_ID of the user's is the only one that the pod gets, in both modes."""
    for more in ({}, CRON):
        container = job_spec(render(values({"TUNE_RUN_ID": "mine"}, **more)))["template"]["spec"]["containers"][0]
        assert [item for item in container["env"] if item["name"] == "TUNE_RUN_ID"] == [
            {"name": "TUNE_RUN_ID", "value": "mine"}
        ]


def test_run_id_of_a_schedule():
    """Every scheduled Job is a run of its own, named after the Job."""
    (container,) = job_spec(render(values(**CRON)))["template"]["spec"]["containers"]
    (run,) = [item for item in container["env"] if item["name"] == "TUNE_RUN_ID"]
    assert run["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"


@pytest.mark.parametrize("release", ["a", "team.finetune", "n" * 43 + "-" * 9 + "n", "n" * 53, "n" * 70])
def test_names_fit(release):
    """Names are DNS labels of at most 63 (Job, pod) and 52 (CronJob) characters; what is cut is never the hash."""
    job, cron = (only(render(values(**more), name=release), kind) for more, kind in (({}, "Job"), (CRON, "CronJob")))
    assert len(job["metadata"]["name"]) <= 63
    assert len(cron["metadata"]["name"]) <= 52
    changed = only(render(values({"TUNE_SEED": 1}), name=release), "Job")
    assert changed["metadata"]["name"][:-8] == job["metadata"]["name"][:-8]
    assert changed["metadata"]["name"] != job["metadata"]["name"]
    pattern = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    for item in (job, cron, only(render(values(), name=release), "Pod")):
        assert re.fullmatch(pattern, item["metadata"]["name"])


def test_long_names_do_not_collide():
    """Two CronJobs whose names are cut at the same place stay two."""
    names = {only(render(values(**CRON), name="n" * 52 + end), "CronJob")["metadata"]["name"] for end in "ab"}
    assert len(names) == 2


@pytest.mark.parametrize(("keep", "annotations"), [(False, None), (True, {"helm.sh/resource-policy": "keep"})])
def test_keep_on_upgrade(keep, annotations):
    """With keepOnUpgrade Helm leaves the Job alone."""
    assert only(render(values(keepOnUpgrade=keep)), "Job")["metadata"].get("annotations") == annotations


@pytest.mark.parametrize(
    ("release", "namespace", "given"),
    [
        ("2024", "ml", {}),
        ("true", "ml", {}),
        ("demo", "123", {}),
        ("demo", "ml", {"existingSecrets": ["123"]}),
        ("demo", "ml", {"kueue": {"queueName": "1e3"}, "priorityClassName": "10", "runtimeClassName": "0"}),
        ("demo", "ml", {"scratch": {"type": "pvc", "claimName": "7"}}),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("mode", ["job", "cronjob"])
def test_names_that_look_like_numbers(release, namespace, given, mode):
    """A name stays text, whatever YAML would take it for."""
    objects = render(values(**given, **(CRON if mode == "cronjob" else {})), name=release, namespace=namespace)
    manifests.validate(objects, manifests.VERSIONS[-1:])


def test_a_variable_more_changes_no_run_id(tmp_path):
    """A later chart whose table has one variable more continues with the runs of this one."""
    later = shutil.copytree(CHART, tmp_path / "finetune-job")
    table = json.loads((later / "files" / "variables.json").read_text())
    new = {**next(row for row in table if not row["required"] and row["fingerprint"]), "name": "TUNE_NEW"}
    (later / "files" / "variables.json").write_text(json.dumps([*table, new]))
    rendered = helm.Chart.load(str(later)).render(values(), name="demo", namespace="ml")
    job = next(text for path, text in rendered.items() if path.endswith("/job.yaml"))
    assert environment(manifests.documents(job))["TUNE_RUN_ID"] == environment(render(values()))["TUNE_RUN_ID"]
