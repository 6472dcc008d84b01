"""The chart, rendered by Helm itself: its generated parts, what it refuses, and how it names Jobs and runs."""

import json
import re
import tomllib

import helm_python as helm
import pytest
import yaml

from job import env
from job.config import PREFIX, SETTINGS
from tests import chart, manifests
from tests.manifests import CHART, ROOT, environment, files, job_spec, only, render, values

CI = sorted((CHART / "ci").glob("*-values.yaml"))
each_ci = pytest.mark.parametrize("path", CI, ids=[path.name.removesuffix("-values.yaml") for path in CI])
CRON = {"mode": "cronjob", "cron": {"schedule": "@daily"}}


def ci_values(path):
    """A file of values as Helm reads it."""
    return helm.values_from_yaml(path.read_text())


def refused(given):
    """What Helm says of values that it must refuse."""
    with pytest.raises(helm.HelmError) as caught:
        files(given)
    return str(caught.value)


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
            elif path != "global":  # Helm's own, for charts inside charts
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
    assert {name.removesuffix("_FILE") for name in variables} - known <= {"TUNE_METRICS_PORT"}
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


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("TUNE_BATCH_SIZE", 3, "3"),
        ("TUNE_BATCH_SIZE", "3", "3"),
        pytest.param("TUNE_MAX_STEPS", 1000000, "1000000", id="a million is no 1e+06"),
        ("TUNE_SEED", 2**53 - 1, "9007199254740991"),
        ("TUNE_EPOCHS", 0.5, "0.5"),
        ("TUNE_LEARNING_RATE", 0.00001, "1e-05"),
        ("TUNE_LEARNING_RATE", "2e-4", "2e-4"),
        ("TUNE_LEARNING_RATE", "auto", "auto"),
        ("TUNE_LORA_RSLORA", True, "true"),
        ("TUNE_LORA_RSLORA", "false", "false"),
        pytest.param("TUNE_GRADIENT_CHECKPOINTING", False, "off", id="YAML reads off as false"),
        pytest.param("TUNE_GRADIENT_CHECKPOINTING", True, "on", id="YAML reads on as true"),
        ("TUNE_EXPORT", ["adapter", "merged_16bit"], "adapter,merged_16bit"),
        ("TUNE_EXPORT", "adapter, merged_16bit", "adapter, merged_16bit"),
        ("TUNE_DATASET", ["s3://one/a", "hf://datasets/o/n:train"], "s3://one/a,hf://datasets/o/n:train"),
        pytest.param("TUNE_SEED", None, None, id="null leaves it out"),
    ],
)
def test_values_become_text(name, value, text):
    """A setting may be written as YAML's own type or as text, and the job gets the text that it can read."""
    assert environment(render(values({name: value}))).get(name) == text


REFUSED_BY_THE_SCHEMA = [
    (values(mode="cron"), "'/mode': value must be one of 'job', 'cronjob'"),
    (values(mode="cronjob", schedule="@daily"), "additional properties 'schedule' not allowed"),
    (values({"TUNE_EPOCH": 3}), "'/config': additional properties 'TUNE_EPOCH' not allowed"),
    (values({"HF_TOKEN": "x"}), "'/config': additional properties 'HF_TOKEN' not allowed"),
    (values({"TUNE_PRECISION": "4 bit"}), "'/config/TUNE_PRECISION': value must be one of '4bit', '8bit', '16bit'"),
    (values({"TUNE_BATCH_SIZE": "x"}), "'/config/TUNE_BATCH_SIZE': 'x' does not match pattern"),
    (values({"TUNE_BATCH_SIZE": 0}), "'/config/TUNE_BATCH_SIZE': minimum: got 0, want 1"),
    (values({"TUNE_BATCH_SIZE": 8.5}), "'/config/TUNE_BATCH_SIZE': got number, want null or integer or string"),
    (values({"TUNE_BATCH_SIZE": True}), "'/config/TUNE_BATCH_SIZE': got boolean, want null or integer or string"),
    (values({"TUNE_EVAL_FRACTION": 0.9}), "'/config/TUNE_EVAL_FRACTION': maximum: got 0.9, want 0.5"),
    (values({"TUNE_LEARNING_RATE": 0}), "'/config/TUNE_LEARNING_RATE': exclusiveMinimum: got 0, want 0"),
    (values({"TUNE_LEARNING_RATE": "fast"}), "'/config/TUNE_LEARNING_RATE': 'fast' does not match pattern"),
    (values({"TUNE_LORA_RSLORA": "yes"}), "'/config/TUNE_LORA_RSLORA': 'yes' does not match pattern"),
    (values({"TUNE_OUTPUT": "gs://bucket/x"}), "'/config/TUNE_OUTPUT': 'gs://bucket/x' does not match pattern"),
    (values({"TUNE_DATASET": ["s3://ok/x", "nowhere"]}), "'/config/TUNE_DATASET/1': 'nowhere' does not match pattern"),
    (values({"TUNE_DATASET": ["s3://a/x,s3://b/y"]}), "'/config/TUNE_DATASET/0'"),
    (values({"TUNE_DATASET": []}), "'/config/TUNE_DATASET': minItems: got 0, want 1"),
    (values({"TUNE_EXPORT": "adapter,onnx"}), "'/config/TUNE_EXPORT': 'adapter,onnx' does not match pattern"),
    (values({"TUNE_EXPORT": ["onnx"]}), "'/config/TUNE_EXPORT/0': value must be one of 'adapter', 'merged_16bit'"),
    (values({"TUNE_MODEL_FILE": "relative"}), "'/config/TUNE_MODEL_FILE': 'relative' does not match pattern"),
    (values(scratch={"type": "hostPath"}), "'/scratch/type': value must be one of 'emptyDir', 'ephemeral', 'pvc'"),
    (values(scratch={"size": "50GB"}), "'/scratch/size': '50GB' does not match pattern"),
    (values(gpu={"count": "1"}), "'/gpu/count': got string, want integer"),
    (values(gpu={"resource": "gpu"}), "'/gpu/resource': 'gpu' does not match pattern"),
    (values(image={"digest": "sha256:abc"}), "'/image/digest': 'sha256:abc' does not match pattern"),
    (values(spot={"provider": "azure"}), "'/spot/provider': value must be one of"),
    (values(cron={"concurrencyPolicy": "Never"}), "'/cron/concurrencyPolicy': value must be one of 'Forbid'"),
    (values(cron={"timeZone": "Local"}), "'/cron/timeZone'"),
    (values(podSecurityContext={"runAsNonRoot": False}), "'/podSecurityContext/runAsNonRoot': value must be true"),
    (values(podSecurityContext={"runAsUser": 0}), "'/podSecurityContext/runAsUser': minimum: got 0, want 1"),
    (values(activeDeadlineSeconds=0), "'/activeDeadlineSeconds': minimum: got 0, want 60"),
    (values(networkPolicy={"egress": [{"cidr": "10.0.0.0/8"}]}), "missing property 'ports'"),
    (values(metrics={"port": 80}), "'/metrics/port': minimum: got 80, want 1,024"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED_BY_THE_SCHEMA, ids=[row[1][:60] for row in REFUSED_BY_THE_SCHEMA])
def test_schema_refuses(given, message):
    """The chart's own schema refuses wrong names, types, words and numbers, and says where."""
    with pytest.raises(helm.HelmValuesError) as caught:
        files(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "schedule",
    ["* * *", "61 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * * 7", "*/0 * * * *", "1-"]
    + ["* * * * * *", "@often", "@every 1h", "0 3 * * sunday", "TZ=UTC 0 3 * * *", "0,,5 * * * *"],
)
def test_bad_schedules_are_refused_in_words(schedule):
    """A schedule that the CronJob controller would refuse is refused first, with the rule in words."""
    said = refused(values(mode="cronjob", cron={"schedule": schedule}))
    assert "'/cron/schedule': value must be 'five fields: minute 0-59, hour 0-23" in said


@pytest.mark.parametrize(
    "schedule",
    ["0 3 * * 0", "*/15 * * * *", "0 0,12 1-15 jan-MAR ?", "5/10 22 * 12 MON-FRI", "@daily", "00 03 01 01 *", "0  3 * * *"],
)
def test_good_schedules_pass(schedule):
    """A schedule in any of the usual forms is passed on as it is."""
    cron = only(render(values(mode="cronjob", cron={"schedule": schedule})), "CronJob")
    assert cron["spec"]["schedule"] == schedule


REFUSED_BY_A_RULE = [
    ({}, "config.TUNE_MODEL is not set. It is required: org/name[@revision]"),
    (values({"TUNE_MODEL_FILE": "/m"}), "config.TUNE_MODEL and config.TUNE_MODEL_FILE are both set. Keep one"),
    (values({"TUNE_EVAL_FRACTION": "0.9"}), "config.TUNE_EVAL_FRACTION=0.9 is not valid. Expected: a number, at least 0"),
    (values({"TUNE_BATCH_SIZE": "0"}), "config.TUNE_BATCH_SIZE=0 is not valid. Expected: a whole number, at least 1"),
    (values({"TUNE_EPOCHS": "0"}), "config.TUNE_EPOCHS=0 is not valid. Expected: a number, above 0"),
    (values(gpu={"count": 2}), "gpu.count=2: the job trains on one GPU"),
    (values({"TUNE_DEVICE": "cuda"}, gpu={"count": 0}), "config.TUNE_DEVICE=cuda needs a GPU and gpu.count is 0"),
    (values({"TUNE_DEVICE": "cpu"}), "TUNE_DEVICE=cpu would leave the GPU that the pod asks for idle. Set gpu.count to 0"),
    (values({"TUNE_GRACE_SECONDS": 121}), "config.TUNE_GRACE_SECONDS=121 is more than the platform leaves (120 s"),
    (values({"TUNE_GRACE_SECONDS": 60}, spot={"enabled": True, "provider": "gke"}), "more than the platform leaves (15 s"),
    (values(mode="cronjob"), "mode is cronjob and cron.schedule is empty"),
    (values(caBundle={"configMap": "a", "secret": "b"}), "caBundle.configMap and caBundle.secret are both set"),
    (values(scratch={"type": "pvc"}), "scratch.type is pvc and scratch.claimName is empty"),
    (values(spot={"enabled": True}), "spot.enabled is true and spot.provider is empty"),
    (values(metrics={"podMonitor": {"enabled": True}}), "metrics.podMonitor.enabled needs the endpoint"),
    (values(networkPolicy={"enabled": True}), "networkPolicy.egress is empty"),
    (values(extraEnv=[{"name": "TUNE_SEED", "value": "1"}]), "extraEnv names TUNE_SEED. Settings of the run belong under"),
    (values(extraEnv=[{"name": "AWS_REGION", "value": "x"}], s3={"region": "y"}), "extraEnv names AWS_REGION, which the"),
    (values(resources={"limits": {"nvidia.com/gpu": 1}}), "resources.limits names nvidia.com/gpu. Set gpu.count instead"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED_BY_A_RULE, ids=[row[1][:60] for row in REFUSED_BY_A_RULE])
def test_rules_between_values(given, message):
    """What no schema can say is refused at template time with the value, the rule and the remedy."""
    assert message in refused(given)


def test_all_problems_at_once():
    """One message names every problem that the rules find."""
    said = refused({"gpu": {"count": 2}, "spot": {"enabled": True}})
    assert said.count("\n- ") == 5


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


@pytest.mark.parametrize("release", ["a", "team.finetune", "n" * 43 + "-" * 9 + "n", "n" * 53])
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
    """keepOnUpgrade tells Helm to leave the Job alone."""
    assert only(render(values(keepOnUpgrade=keep)), "Job")["metadata"].get("annotations") == annotations
