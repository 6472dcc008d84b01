"""What the chart's values may be: what it takes and how it passes it on, and what it refuses and with which words."""

import helm_python as helm
import pytest

from tests.manifests import environment, files, only, pod_specs, render, values


def refused(given):
    """What Helm says of values that it must refuse."""
    with pytest.raises(helm.HelmError) as caught:
        files(given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("TUNE_BATCH_SIZE", 3, "3"),
        ("TUNE_BATCH_SIZE", "3", "3"),
        pytest.param("TUNE_MAX_STEPS", 1000000, "1000000", id="a million is no 1e+06"),
        ("TUNE_SEED", 2**32 - 1, "4294967295"),
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
    (values(image={"repository": "r.example/a:1"}), "'/image/repository': 'r.example/a:1' does not match pattern"),
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


@pytest.mark.parametrize(
    ("given", "message"), REFUSED_BY_THE_SCHEMA, ids=[row[1][:60] for row in REFUSED_BY_THE_SCHEMA]
)
def test_schema_refuses(given, message):
    """The chart's own schema refuses wrong names, types, words and numbers, and says where."""
    with pytest.raises(helm.HelmValuesError) as caught:
        files(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "schedule",
    [
        *("* * *", "61 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * * 7", "*/0 * * * *"),
        *("* * * * * *", "@often", "@every 1h", "0 3 * * sunday", "TZ=UTC 0 3 * * *", "0,,5 * * * *", "1- * * * *"),
    ],
)
def test_bad_schedules_are_refused_in_words(schedule):
    """A schedule that the CronJob controller would refuse is refused first, with the rule in words."""
    said = refused(values(mode="cronjob", cron={"schedule": schedule}))
    assert "'/cron/schedule': value must be 'five fields: minute 0-59, hour 0-23" in said


@pytest.mark.parametrize(
    "schedule",
    [
        "0 3 * * 0",
        "*/15 * * * *",
        "0 0,12 1-15 jan-MAR ?",
        "5/10 22 * 12 MON-FRI",
        "@daily",
        "00 03 01 01 *",
        "0  3 * * *",
    ],
)
def test_good_schedules_pass(schedule):
    """A schedule in any of the usual forms is passed on as it is."""
    cron = only(render(values(mode="cronjob", cron={"schedule": schedule})), "CronJob")
    assert cron["spec"]["schedule"] == schedule


CRON = {"mode": "cronjob", "cron": {"schedule": "@daily"}}
BESIDES = (
    "resources.{part} names {name}, which the pod would ask for besides gpu.count=1 of nvidia.com/gpu. "
    "Set gpu.resource to {name} and gpu.count to 1 instead"
)
REFUSED_BY_A_RULE = [
    (values(cron={"schedule": "@daily"}), 'cron.schedule is "@daily" and mode is job'),
    (values(**CRON, keepOnUpgrade=True), "keepOnUpgrade is true and mode is cronjob"),
    (values(spot={"provider": "gke"}), "spot.provider is gke and spot.enabled is false"),
    (
        values(networkPolicy={"egress": [{"cidr": "10.0.0.0/8", "ports": [443]}]}),
        "networkPolicy.egress is set and networkPolicy.enabled is false",
    ),
    (values(scratch={"claimName": "mine"}), "scratch.claimName is set and scratch.type is emptyDir"),
    (values(scratch={"storageClassName": "fast"}), "scratch.storageClassName is set and scratch.type is emptyDir"),
    (values(s3={"endpoint": "https://user:secret@minio.example"}), "s3.endpoint holds a user or password"),
    (values(proxy={"httpsProxy": "http://user:secret@proxy:3128"}), "proxy.httpsProxy holds a user or password"),
    (values({"TUNE_DEVICE_FILE": "/etc/device"}), "config.TUNE_DEVICE_FILE cannot be used: the image sets TUNE_DEVICE"),
    (values({"TUNE_MICRO_BATCH": 9}), "config.TUNE_MICRO_BATCH=9 is more than TUNE_BATCH_SIZE=8"),
    (
        values({"TUNE_LOG_LEVEL": "warning"}, metrics={"enabled": True}),
        "config.TUNE_LOG_LEVEL=warning drops them",
    ),
    (values({"TUNE_PRECISION": "8bit"}, gpu={"count": 0}), "config.TUNE_PRECISION=8bit needs a GPU"),
    (values({"TUNE_RESUME": "fresh"}, **CRON), "config.TUNE_RESUME=fresh starts over at every start"),
    (values({"TUNE_METRICS_PORT_FILE": "/etc/port"}), "config.TUNE_METRICS_PORT is set by the chart"),
    ({}, "config.TUNE_MODEL is not set. It is required: org/name[@revision]"),
    (values({"TUNE_MODEL_FILE": "/m"}), "config.TUNE_MODEL and config.TUNE_MODEL_FILE are both set. Keep one"),
    (
        values({"TUNE_EVAL_FRACTION": "0.9"}),
        "config.TUNE_EVAL_FRACTION=0.9 is not valid. Expected: a number, at least 0",
    ),
    (values({"TUNE_BATCH_SIZE": "0"}), "config.TUNE_BATCH_SIZE=0 is not valid. Expected: a whole number, at least 1"),
    (values({"TUNE_EPOCHS": "0"}), "config.TUNE_EPOCHS=0 is not valid. Expected: a number, above 0"),
    (values(gpu={"count": 2}), "gpu.count=2: the job trains on one GPU"),
    (values({"TUNE_DEVICE": "cuda"}, gpu={"count": 0}), "config.TUNE_DEVICE=cuda needs a GPU and gpu.count is 0"),
    (
        values({"TUNE_DEVICE": "cpu"}),
        "TUNE_DEVICE=cpu would leave the GPU that the pod asks for idle. Set gpu.count to 0",
    ),
    (values({"TUNE_GRACE_SECONDS": 121}), "config.TUNE_GRACE_SECONDS=121 is more than the platform leaves (120 s"),
    (
        values({"TUNE_GRACE_SECONDS": 60}, spot={"enabled": True, "provider": "gke"}),
        "more than the platform leaves (15 s",
    ),
    (values(mode="cronjob"), "mode is cronjob and cron.schedule is empty"),
    (values(caBundle={"configMap": "a", "secret": "b"}), "caBundle.configMap and caBundle.secret are both set"),
    (values(scratch={"type": "pvc"}), "scratch.type is pvc and scratch.claimName is empty"),
    (values(spot={"enabled": True}), "spot.enabled is true and spot.provider is empty"),
    (values(metrics={"podMonitor": {"enabled": True}}), "metrics.podMonitor.enabled needs the endpoint"),
    (
        values(serviceAccount={"create": False, "annotations": {"a": "b"}}),
        "annotations are set and serviceAccount.create",
    ),
    (values(networkPolicy={"enabled": True}), "networkPolicy.egress is empty"),
    (
        values(extraEnv=[{"name": "TUNE_SEED", "value": "1"}]),
        "extraEnv names TUNE_SEED. Settings of the run belong under",
    ),
    (
        values(extraEnv=[{"name": "AWS_REGION", "value": "x"}], s3={"region": "y"}),
        "extraEnv names AWS_REGION, which the",
    ),
    (
        values(resources={"limits": {"nvidia.com/gpu": 1}}),
        "resources.limits names nvidia.com/gpu. Set gpu.count instead",
    ),
    *(
        (
            values(resources={part: {name: 1}}),
            BESIDES.format(part=part, name=name),
        )
        for part, name in [
            ("limits", "nvidia.com/mig-1g.10gb"),
            ("requests", "nvidia.com/mig-3g.40gb"),
            ("limits", "nvidia.com/gpu.shared"),
            ("limits", "amd.com/gpu"),
            ("limits", "gpu.intel.com/i915"),
            ("limits", "aws.amazon.com/neuroncore"),
            ("limits", "volcano.sh/vgpu-number"),
        ]
    ),
    (
        values(gpu={"count": 0}, resources={"limits": {"nvidia.com/mig-1g.10gb": 1}}),
        "besides gpu.count=0 of nvidia.com/gpu. Set gpu.resource to nvidia.com/mig-1g.10gb",
    ),
    (
        values(gpu={"resource": "nvidia.com/mig-1g.10gb"}, resources={"limits": {"nvidia.com/gpu": 1}}),
        "besides gpu.count=1 of nvidia.com/mig-1g.10gb. Set gpu.resource to nvidia.com/gpu",
    ),
    (
        values(resources={"requests": {"vpc.amazonaws.com/efa": 1}}),
        "resources.requests names vpc.amazonaws.com/efa, and resources.limits does not name it with the same amount",
    ),
    (
        values(resources={"requests": {"hugepages-2Mi": "1Gi"}, "limits": {"hugepages-2Mi": "2Gi"}}),
        "resources.requests names hugepages-2Mi, and resources.limits does not name it with the same amount",
    ),
    (values(gpu={"resource": "amd.com/gpu"}), "gpu.resource is amd.com/gpu: the image trains on NVIDIA GPUs"),
    (values(enabled=False), "enabled is false, and the chart is installed all the same"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED_BY_A_RULE, ids=[row[1][:60] for row in REFUSED_BY_A_RULE])
def test_rules_between_values(given, message):
    """What no schema can say is refused at template time with the value, the rule and the remedy."""
    assert message in refused(given)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        pytest.param({"gpu": {"resource": "nvidia.com/mig-1g.10gb"}}, {"nvidia.com/mig-1g.10gb": "1"}, id="slice"),
        pytest.param({"gpu": {"resource": "nvidia.com/gpu.shared"}}, {"nvidia.com/gpu.shared": "1"}, id="shared"),
        pytest.param(
            {"resources": {"limits": {"nvidia.com/gpumem": 8000, "nvidia.com/gpucores": 50}}},
            {"nvidia.com/gpu": "1", "nvidia.com/gpumem": 8000, "nvidia.com/gpucores": 50},
            id="a part of a GPU, by memory and cores",
        ),
        pytest.param(
            {"resources": {"requests": {"vpc.amazonaws.com/efa": 1}, "limits": {"vpc.amazonaws.com/efa": "1"}}},
            {"nvidia.com/gpu": "1", "vpc.amazonaws.com/efa": "1"},
            id="a network device",
        ),
    ],
)
def test_one_accelerator(given, limits):
    """The pod asks for the one accelerator that is named, and for what else it is given."""
    for pod in pod_specs(render(values(**given))):
        asked = pod["containers"][0]["resources"]["limits"]
        assert {name: amount for name, amount in asked.items() if "/" in name} == limits


def test_all_problems_at_once():
    """One message names every problem that the rules find."""
    said = refused({"gpu": {"count": 2}, "spot": {"enabled": True}})
    assert said.count("\n- ") == 5
