"""What the chart's pods are made of."""

import pytest

from tests import manifests
from tests.deploy.test_chart import CRON, ci_values, each_ci
from tests.manifests import CHART, environment, files, job_spec, only, render, values


def container_of(given, **more):
    (container,) = job_spec(render(given, **more))["template"]["spec"]["containers"]
    return container


@each_ci
def test_preflight_is_the_same_pod(path):
    """The test pod of `helm test` is the Job's own pod; only its arguments and its deadline differ, and it has no
    metrics to scrape. It stays, since older Helms read its log after they would have deleted it."""
    objects = render(ci_values(path))
    template, test = job_spec(objects)["template"], only(objects, "Pod")
    assert test["spec"].pop("activeDeadlineSeconds") > 0
    assert test["spec"]["containers"][0].pop("args") == ["preflight"]
    assert "ports" not in test["spec"]["containers"][0]
    template["spec"]["containers"][0].pop("ports", None)
    assert test["spec"] == template["spec"]
    assert test["metadata"]["labels"] == template["metadata"]["labels"]
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert test["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_job_defaults():
    """A Job ends some day, never runs two pods at once, and says why it failed."""
    spec = job_spec(render(values()))
    assert spec["activeDeadlineSeconds"] == 86400
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert "ttlSecondsAfterFinished" not in spec
    assert job_spec(render(values(ttlSecondsAfterFinished=0)))["ttlSecondsAfterFinished"] == 0
    (container,) = spec["template"]["spec"]["containers"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert not {"command", "args"} & set(container)


@pytest.mark.parametrize(
    ("more", "pod", "job"),
    [
        pytest.param({}, 120, "120", id="default"),
        pytest.param({"terminationGracePeriodSeconds": 30}, 30, "30", id="less"),
        pytest.param({"spot": {"enabled": True, "provider": "gke"}}, 120, "15", id="spot"),
        pytest.param(
            {"spot": {"enabled": True, "provider": "karpenter", "graceSeconds": 500}}, 120, "120", id="never more"
        ),
        pytest.param({"spot": {"enabled": False, "graceSeconds": 5}}, 120, "120", id="spot switched off"),
    ],
)
def test_grace(more, pod, job):
    """The job gets the time that the platform really leaves, and never more than the pod asks for."""
    objects = render(values(**more))
    assert job_spec(objects)["template"]["spec"]["terminationGracePeriodSeconds"] == pod
    assert environment(objects)["TUNE_GRACE_SECONDS"] == job


@pytest.mark.parametrize(
    ("provider", "label", "taint"),
    [
        ("gke", {"cloud.google.com/gke-spot": "true"}, "cloud.google.com/gke-spot"),
        ("eks", {"eks.amazonaws.com/capacityType": "SPOT"}, None),
        ("karpenter", {"karpenter.sh/capacity-type": "spot"}, None),
        ("aks", {"kubernetes.azure.com/scalesetpriority": "spot"}, "kubernetes.azure.com/scalesetpriority"),
        ("other", {}, None),
    ],
)
def test_spot_nodes(provider, label, taint):
    """The spot profile chooses the platform's spot nodes besides what the user asks for."""
    given = values(
        spot={"enabled": True, "provider": provider}, nodeSelector={"disk": "ssd"}, tolerations=[{"key": "own"}]
    )
    spec = job_spec(render(given))["template"]["spec"]
    assert spec["nodeSelector"] == {"disk": "ssd", **label}
    assert [item["key"] for item in spec["tolerations"]] == ["nvidia.com/gpu", *([taint] if taint else []), "own"]


def test_without_a_gpu():
    """Without a GPU the pod asks for none, is set to use the CPU, and sees none by accident."""
    objects = render(values(gpu={"count": 0}))
    spec = job_spec(objects)["template"]["spec"]
    assert "nvidia.com/gpu" not in spec["containers"][0]["resources"]["limits"]
    assert "tolerations" not in spec
    assert environment(objects)["TUNE_DEVICE"] == "cpu"
    assert environment(objects)["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_with_a_gpu():
    """With a GPU the image's own TUNE_DEVICE=cuda stays in force, and exactly one is asked for."""
    objects = render(values(gpu={"resource": "nvidia.com/mig-1g.10gb"}))
    assert container_of(values(gpu={"resource": "nvidia.com/mig-1g.10gb"}))["resources"]["limits"] == {
        "memory": "12Gi",
        "nvidia.com/mig-1g.10gb": "1",
    }
    assert not {"TUNE_DEVICE", "NVIDIA_VISIBLE_DEVICES"} & set(environment(objects))


@pytest.mark.parametrize("source", ["configMap", "secret"])
def test_certificate_authorities(source):
    """A CA bundle is mounted, and boto3, requests and OpenSSL are pointed at it."""
    objects = render(values(caBundle={source: "company", "key": "bundle.pem"}))
    spec = job_spec(objects)["template"]["spec"]
    (mount,) = [item for item in spec["containers"][0]["volumeMounts"] if item["name"] == "ca"]
    (volume,) = [item for item in spec["volumes"] if item["name"] == "ca"]
    assert volume[source]["name" if source == "configMap" else "secretName"] == "company"
    (item,) = volume[source]["items"]
    assert item["key"] == "bundle.pem"
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        assert environment(objects)[name] == f"{mount['mountPath']}/{item['path']}"


def test_how_stores_are_reached():
    """Endpoint, region and proxies become the variables that boto3 reads; credentials come from secrets alone."""
    given = values(
        s3={"endpoint": "https://minio:9000", "region": "eu-1"},
        proxy={"httpsProxy": "http://p:1", "httpProxy": "http://p:2", "noProxy": ".svc"},
        existingSecrets=["one", "two"],
    )
    actual = environment(render(given))
    expected = {
        "AWS_ENDPOINT_URL_S3": "https://minio:9000",
        "AWS_REGION": "eu-1",
        "AWS_DEFAULT_REGION": "eu-1",
        "HTTPS_PROXY": "http://p:1",
        "HTTP_PROXY": "http://p:2",
        "NO_PROXY": ".svc",
    }
    assert expected.items() <= actual.items()
    assert [item["secretRef"]["name"] for item in container_of(given)["envFrom"]] == ["one", "two"]
    assert not set(expected) & set(environment(render(values())))


@pytest.mark.parametrize(
    ("scratch", "volume", "reserved"),
    [
        ({}, {"emptyDir": {"sizeLimit": "50Gi"}}, "50Gi"),
        ({"type": "pvc", "claimName": "mine"}, {"persistentVolumeClaim": {"claimName": "mine"}}, None),
    ],
)
def test_scratch(scratch, volume, reserved):
    """Scratch is where the values say, and on the node's disk its size is reserved."""
    objects = render(values(scratch=scratch))
    spec = job_spec(objects)["template"]["spec"]
    assert {"name": "scratch", **volume} in spec["volumes"]
    assert spec["containers"][0]["resources"]["requests"].get("ephemeral-storage") == reserved


def test_ephemeral_scratch():
    """A volume of the pod's own has the size and the class asked for."""
    (volume, *_) = job_spec(render(ci_values(CHART / "ci" / "ephemeral-scratch-values.yaml")))["template"]["spec"][
        "volumes"
    ]
    claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("fast-ssd", "200Gi")


@each_ci
def test_kueue_is_only_a_label(path):
    """The chart never suspends a Job; where a queue is named, the Job carries its label, inside a CronJob too."""
    given = ci_values(path)
    objects = render(given)
    assert "suspend" not in job_spec(objects)
    owner = objects[[item["kind"] in ("Job", "CronJob") for item in objects].index(True)]
    metadata = owner["spec"]["jobTemplate"]["metadata"] if owner["kind"] == "CronJob" else owner["metadata"]
    assert metadata["labels"].get("kueue.x-k8s.io/queue-name") == given.get("kueue", {}).get("queueName")


def test_network_policy():
    """Only DNS and the listed addresses can be reached, and nothing reaches the pod but the scrapes of its metrics."""
    egress = [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"], "ports": [443]}]
    given = values(networkPolicy={"enabled": True, "egress": egress})
    objects = render(given)
    policy = only(objects, "NetworkPolicy")["spec"]
    labels = job_spec(objects)["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    dns, store = policy["egress"]
    assert {(item["port"], item["protocol"]) for item in dns["ports"]} == {
        (port, protocol) for port in (53, 5353) for protocol in ("UDP", "TCP")
    }
    assert store["to"] == [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]
    assert "ingress" not in policy
    metered = only(render({**given, "metrics": {"enabled": True}}), "NetworkPolicy")["spec"]
    assert metered["ingress"] == [{"ports": [{"protocol": "TCP", "port": 9400}]}]


def test_metrics():
    """Metrics are served on the port that the pod names, and the PodMonitor scrapes that port of these pods."""
    objects = render(values(metrics={"enabled": True, "port": 9000, "podMonitor": {"enabled": True}}))
    (container,) = job_spec(objects)["template"]["spec"]["containers"]
    assert environment(objects)["TUNE_METRICS_PORT"] == "9000"
    assert container["ports"] == [{"name": "metrics", "containerPort": 9000}]
    monitor = only(objects, "PodMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert [item["port"] for item in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    labels = job_spec(objects)["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_service_account():
    """The pod runs as the release's own account, or as the one that the user names; neither mounts a token."""
    account = only(render(values(serviceAccount={"annotations": {"a": "b"}})), "ServiceAccount")
    assert (account["metadata"]["name"], account["metadata"]["annotations"]) == ("demo", {"a": "b"})
    assert account["automountServiceAccountToken"] is False
    for given, name in (
        ({"create": False}, "default"),
        ({"create": False, "name": "own"}, "own"),
        ({"name": "x"}, "x"),
    ):
        objects = render(values(serviceAccount=given))
        assert job_spec(objects)["template"]["spec"]["serviceAccountName"] == name
        assert ("ServiceAccount" in {item["kind"] for item in objects}) is given.get("create", True)


def test_image():
    """A digest decides which image runs; registry credentials are passed on."""
    digest = "sha256:" + "0" * 64
    given = values(
        image={"repository": "r.example:5000/a/b", "tag": "1", "digest": digest}, imagePullSecrets=[{"name": "x"}]
    )
    assert container_of(given)["image"] == f"r.example:5000/a/b:1@{digest}"
    assert job_spec(render(given))["template"]["spec"]["imagePullSecrets"] == [{"name": "x"}]


def test_extras():
    """Variables, volumes and mounts of the user's stand beside the chart's own."""
    given = values(
        extraEnv=[{"name": "HF_HOME", "value": "/scratch/hf"}],
        extraVolumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "d"}}],
        extraVolumeMounts=[{"name": "data", "mountPath": "/data"}],
        podLabels={"azure.workload.identity/use": "true"},
        podAnnotations={"a": "b"},
        priorityClassName="high",
        runtimeClassName="nvidia",
    )
    template = job_spec(render(given))["template"]
    assert template["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    assert template["metadata"]["annotations"] == {"a": "b"}
    assert (template["spec"]["priorityClassName"], template["spec"]["runtimeClassName"]) == ("high", "nvidia")
    assert {"name": "HF_HOME", "value": "/scratch/hf"} in template["spec"]["containers"][0]["env"]
    assert (
        template["spec"]["volumes"][-1]["name"]
        == template["spec"]["containers"][0]["volumeMounts"][-1]["name"]
        == "data"
    )


@pytest.mark.parametrize("more", [{}, CRON, {"kueue": {"queueName": "q"}}], ids=["job", "cronjob", "kueue"])
def test_notes_name_the_next_commands(more):
    """After an install the user reads how to follow, find and stop the run, with the names that the objects have."""
    rendered = files(values(**more))
    notes = rendered["NOTES.txt"]
    objects = render(values(**more))
    job = "<job>" if more == CRON else only(objects, "Job")["metadata"]["name"]
    run = environment(objects)["TUNE_RUN_ID"] or "<job>"
    for part in (
        f"logs -f job/{job}",
        f"get job {job}",
        f"s3://bucket/runs/{run}/adapter/",
        "helm test demo -n ml",
        "exitCode",
    ):
        assert part in notes
    assert ("patch workload" if "kueue" in more else f"patch job {job}") in notes
    assert "{{" not in notes


def test_oldest_cluster_is_declared():
    """The chart states the Kubernetes version from which on its objects are validated."""
    assert ">={}.{}.0-0".format(*manifests.OLDEST) == manifests.chart().metadata["kubeVersion"]
