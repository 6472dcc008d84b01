"""Every pod that the chart and `k8s/` can make keeps the "restricted" Pod Security Standard and the usual policies.

checkov 3.3.30 was run once by hand over what `ci/` and `k8s/` make: its names stand beside the rules. It would change
locked packages, so CI runs the rules below instead. What it wants and these pods do not do, with the reason:

- CKV_K8S_8, 9    probes: nothing is served, and a Job that hangs ends at its deadline
- CKV_K8S_11      CPU limits: they would only slow a run down
- CKV_K8S_15, 43  pull policy Always, digests: image.pullPolicy and image.digest are the user's choice
- CKV_K8S_21      a namespace: Helm gives one, with kustomize `kubectl -n` does
- CKV_K8S_35      secrets as files: boto3 and the hub read keys from variables; workload identity needs none
- CKV_K8S_40      a high user id: 10001 unless the platform chooses it (podSecurityContext.runAsUser: null)
- CKV2_K8S_6      a network policy: networkPolicy.enabled, since only the user knows the addresses of the stores
"""

import functools
import re

import helm_python as helm
import pytest

from tests import manifests
from tests.deploy.test_chart import ci_values
from tests.manifests import CHART, ROOT, files, pod_specs, render, values

OVERLAYS = [ROOT / "k8s" / name for name in ("base", "overlays/single-gpu", "overlays/cron")]
ALLOWED_VOLUMES = {"emptyDir", "ephemeral", "persistentVolumeClaim", "configMap", "secret"}


@functools.cache
def every_pod():
    """Each rendered pod by the name of what it was rendered from."""
    found = {path.name: pod_specs(render(ci_values(path))) for path in sorted((CHART / "ci").glob("*.yaml"))}
    found |= {str(path.relative_to(ROOT)): pod_specs(manifests.kustomize(path)) for path in OVERLAYS}
    return [(name, pod) for name, pods in found.items() for pod in pods]


RULES = {
    "not root (CKV_K8S_6, 23)": lambda pod: pod["securityContext"]["runAsNonRoot"] is True,
    "not user 0": lambda pod: pod["securityContext"].get("runAsUser", 10001) >= 10000,
    "seccomp (CKV_K8S_31)": lambda pod: pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"},
    "no token (CKV_K8S_38)": lambda pod: pod["automountServiceAccountToken"] is False,
    "no service links": lambda pod: pod["enableServiceLinks"] is False,
    "an account of its own (CKV_K8S_41)": lambda pod: pod["serviceAccountName"] not in ("", "default"),
    "no host namespaces (CKV_K8S_17, 18, 19)": lambda pod: not {"hostPID", "hostIPC", "hostNetwork"} & set(pod),
    "no host paths (CKV_K8S_27)": lambda pod: all(set(v) - {"name"} <= ALLOWED_VOLUMES for v in pod["volumes"]),
    "no escalation (CKV_K8S_20)": lambda pod: context(pod)["allowPrivilegeEscalation"] is False,
    "no privileges (CKV_K8S_16)": lambda pod: not context(pod).get("privileged", False),
    "no capabilities (CKV_K8S_28, 37)": lambda pod: context(pod)["capabilities"] == {"drop": ["ALL"]},
    "read-only root (CKV_K8S_22)": lambda pod: context(pod)["readOnlyRootFilesystem"] is True,
    "no host ports (CKV_K8S_26)": lambda pod: not any("hostPort" in p for p in only_container(pod).get("ports", [])),
    "a tag, not latest (CKV_K8S_14)": lambda pod: re.search(r":[\d.]+(@sha256:|$)", only_container(pod)["image"]),
    "CPU request (CKV_K8S_10)": lambda pod: only_container(pod)["resources"]["requests"]["cpu"],
    "memory bounded (CKV_K8S_12, 13)": lambda pod: (
        only_container(pod)["resources"]["requests"]["memory"] == only_container(pod)["resources"]["limits"]["memory"]
    ),
    "a bounded disk": lambda pod: all(v["emptyDir"].get("sizeLimit") for v in pod["volumes"] if "emptyDir" in v),
    "scratch and shared memory": lambda pod: (
        {"/scratch", "/dev/shm"} <= {m["mountPath"] for m in only_container(pod)["volumeMounts"]}
    ),
}


def only_container(pod):
    (container,) = pod["containers"]
    assert "initContainers" not in pod
    return container


def context(pod):
    return only_container(pod)["securityContext"]


@pytest.mark.process
@pytest.mark.parametrize("rule", RULES)
def test_every_pod_keeps_the_rule(rule):
    """No pod that the chart or `k8s/` can make breaks a rule of the "restricted" standard or the usual policies."""
    assert [name for name, pod in every_pod() if not RULES[rule](pod)] == []


def test_rules_can_fail():
    """A pod without the rules' settings breaks them: each rule looks at something."""
    bare = {"containers": [{"image": "x:latest", "resources": {"requests": {}, "limits": {}}, "volumeMounts": []}]}
    bare |= {
        "serviceAccountName": "default",
        "hostPID": True,
        "volumes": [{"name": "h", "hostPath": {}}, {"emptyDir": {}}],
    }
    bare |= {"securityContext": {"runAsUser": 0}}
    bare["containers"][0] |= {"securityContext": {"privileged": True}, "ports": [{"hostPort": 1}]}
    for name, rule in RULES.items():
        try:
            assert not rule(bare), name
        except KeyError:
            continue


def test_helm_refuses_what_the_chart_fixes():
    """The container's security context is no value: nothing can loosen it."""
    with pytest.raises(helm.HelmValuesError, match="securityContext"):
        files(values(securityContext={"privileged": True}))
