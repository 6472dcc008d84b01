"""One meaning for each exit code: what a scheduler does with it is the same wherever the job runs.

A place is a function that reads a real manifest and returns {code: action} for the codes that it names. A code that a
place does not name is counted as a failure and tried again: `COUNT`.
"""

import pytest

from job.runtime.errors import KINDS, JobError
from tests import manifests
from tests.manifests import ROOT, job_spec, render, values

pytestmark = pytest.mark.process

FAIL, IGNORE, COUNT = "give up", "try again, uncounted", "try again, counted"
UNCOUNTED = {"interrupted"}  # preemptions are no failures of the run
CODES = {
    kind.exit_code: (IGNORE if kind.kind in UNCOUNTED else COUNT) if kind.retry else FAIL for kind in (*KINDS, JobError)
}


def _job(spec):
    """The codes of a Job's podFailurePolicy. The first rule that matches decides."""
    found = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": []})
        for code in codes["values"]:
            assert (codes["operator"], codes["containerName"]) == ("In", "finetune-job")
            found.setdefault(code, {"FailJob": FAIL, "Ignore": IGNORE, "Count": COUNT}[rule["action"]])
    return found


def chart_job():
    """The chart's Job."""
    return _job(job_spec(render(values())))


def chart_cronjob():
    """The chart's CronJob."""
    return _job(job_spec(render(values(mode="cronjob", cron={"schedule": "@daily"}))))


def kustomize_base():
    """The kustomize base."""
    return _job(job_spec(manifests.kustomize(ROOT / "k8s" / "base")))


def kustomize_cron():
    """The kustomize overlay with a schedule."""
    return _job(job_spec(manifests.kustomize(ROOT / "k8s" / "overlays" / "cron")))


PLACES = (chart_job, chart_cronjob, kustomize_base, kustomize_cron)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_place_does_what_the_code_means(place):
    """Each place does with each exit code what the code means, and names no code that does not exist."""
    named = place()
    assert {code: named.get(code, COUNT) for code in CODES} == CODES
    assert set(named) <= set(CODES)


@pytest.mark.parametrize("spec", [chart_job, kustomize_base], ids=lambda place: place.__name__)
def test_disruption_stands_between(spec):
    """A code that says "give up" decides before a disruption does, and a disruption before code 75."""
    rules = (job_spec(render(values())) if spec is chart_job else job_spec(manifests.kustomize(ROOT / "k8s" / "base")))[
        "podFailurePolicy"
    ]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    for rule in (rules[0], rules[2]):  # the API server refuses values that are not in order
        assert rule["onExitCodes"]["values"] == sorted(set(rule["onExitCodes"]["values"]))
