"""cloud/: specs that their platforms' own libraries and schemas accept, and what they do with the job's exit codes."""

import copy
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from job.config import environment
from job.runtime.errors import KINDS, JobError
from tests.jobs import ROOT
from tests.platforms import CLOUD, LIBRARYLESS, PLATFORMS, REJECTIONS, Platform, read

RETRIED = {kind.exit_code: kind.retry for kind in (*KINDS, JobError)} | {137: True}
PLACES = r"change-me|123456789012"


each_platform = pytest.mark.parametrize("platform", PLATFORMS, ids=lambda each: each.spec)
each_code = pytest.mark.parametrize("code", RETRIED)


def parent(spec: Any, path: str) -> tuple[Any, Any]:
    """What holds the value at a path, and its key there."""
    *way, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in way:
        spec = spec[part]
    return spec, last


@pytest.mark.process
@each_platform
def test_the_platform_accepts_the_spec(platform: Platform) -> None:
    """The platform's own library or schema finds nothing wrong."""
    platform.check(read(platform.spec))


@pytest.mark.process
@each_platform
def test_the_platform_rejects_a_wrong_name(platform: Platform) -> None:
    """One letter too many in a name is an error, so a setting cannot be lost in silence."""
    spec = copy.deepcopy(read(platform.spec))
    holder, name = parent(spec, platform.name)
    holder[f"{name}s"] = holder.pop(name)
    with pytest.raises(REJECTIONS):
        platform.check(spec)


@pytest.mark.process
@each_platform
def test_the_platform_rejects_a_wrong_value(platform: Platform) -> None:
    """A value of another type, or outside its list, is an error."""
    spec = copy.deepcopy(read(platform.spec))
    holder, name = parent(spec, platform.value)
    holder[name] = platform.other
    with pytest.raises(REJECTIONS):
        platform.check(spec)


@each_platform
def test_the_job_accepts_its_variables(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every TUNE_* in a spec exists and has a valid value, and the required ones are there."""
    variables = platform.variables(read(platform.spec))
    for name, value in variables.items():
        assert isinstance(value, str), name
        if name.startswith("TUNE_"):
            monkeypatch.setenv(name, value)
    assert not variables or environment.load().output


@each_platform
def test_the_image_is_this_version(platform: Platform) -> None:
    """No spec starts another version than the one that it comes with."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if platform.image:
        holder, name = parent(read(platform.spec), platform.image)
        assert f"finetune-job:{version}" in holder[name]


@pytest.mark.parametrize("path", [*(each.spec for each in PLATFORMS if "compose" not in each.spec), *LIBRARYLESS])
def test_places_to_fill_in_are_marked(path: str) -> None:
    """docs/cloud.md names the marks to look for, and every spec has some."""
    assert re.search(PLACES, (CLOUD / path).read_text())
    assert PLACES in (ROOT / "docs" / "cloud.md").read_text().replace("\\|", "|")


def test_the_documentation_names_files_that_exist() -> None:
    """Every path under cloud/ in docs/cloud.md is there, and every file there is named, or its directory."""
    text = (ROOT / "docs" / "cloud.md").read_text()
    named = set(re.findall(r"cloud/[a-z-]+/[a-z-]+\.(?:json|yaml|sh)", text))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
    for path in (*CLOUD.glob("*/*"), CLOUD / "job.env.example"):
        assert path.name in text


# What each platform does with an exit code: whether it starts the container again.


def aws_batch_retries(code: int) -> bool:
    """The first rule that matches decides; where none does, the job is tried again, up to `attempts`."""
    strategy = read("aws-batch/job-definition.json")["retryStrategy"]
    for rule in strategy["evaluateOnExit"]:
        pattern = rule["onExitCode"]
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), str(code)):
            return rule["action"] == "RETRY"
    return True


def google_batch_retries(code: int) -> bool:
    """One policy is allowed: what FAIL_TASK does not name is tried again, up to `maxRetryCount`."""
    (policy,) = read("gcp-batch/job.json")["taskGroups"][0]["taskSpec"]["lifecyclePolicies"]
    assert policy["action"] == "FAIL_TASK"
    return code not in policy["actionCondition"]["exitCodes"]


def documented(column: int) -> Callable[[int], bool]:
    """What the table in docs/cloud.md says."""

    def retries(code: int) -> bool:
        lines = (ROOT / "docs" / "cloud.md").read_text().splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        (row,) = [row for row in rows if re.search(rf"\b{code}\b", row[0])]
        return row[column].startswith("again")

    return retries


def test_what_is_worth_another_try() -> None:
    """Interruptions, storage outages and unexpected errors are; all other kinds would end the same way again."""
    assert {code for code, retry in RETRIED.items() if retry} == {75, 74, 1, 137}


@each_code
@pytest.mark.parametrize(
    "retries",
    [
        pytest.param(aws_batch_retries, id="aws-batch"),
        pytest.param(google_batch_retries, id="gcp-batch"),
        pytest.param(documented(1), id="docs-batch"),
        pytest.param(documented(2), id="docs-again"),
    ],
)
def test_exit_codes_mean_the_same_everywhere(retries: Callable[[int], bool], code: int) -> None:
    """A platform starts again exactly the kinds of failure that say `retry`, and unexpected errors."""
    assert retries(code) is RETRIED[code]


def test_limits_that_only_the_services_know() -> None:
    """AWS Batch: 1 to 10 attempts, at most 5 rules. Google Batch: 0 to 10 retries."""
    strategy = read("aws-batch/job-definition.json")["retryStrategy"]
    assert 1 <= strategy["attempts"] <= 10
    assert len(strategy["evaluateOnExit"]) <= 5
    assert read("gcp-batch/job.json")["taskGroups"][0]["taskSpec"]["maxRetryCount"] <= 10


def test_skypilot_leaves_counting_to_the_loop() -> None:
    """SkyPilot recovers only from interruptions: with every other code the loop is done already."""
    recovery = read("skypilot/task.yaml")["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75]
    assert recovery["max_restarts_on_errors"] == 0
    assert "run.sh" in read("skypilot/task.yaml")["run"]


def test_sagemaker_starts_the_job_without_tini() -> None:
    """SageMaker's documentation rules tini out; the job itself handles signals as the first process."""
    algorithm = read("sagemaker/create-training-job.json")["AlgorithmSpecification"]
    assert algorithm["ContainerEntrypoint"] == ["python", "-m", "job"]
    assert algorithm["ContainerArguments"] == ["train"]


@pytest.mark.parametrize(
    ("path", "seconds"),
    [
        pytest.param("aws-batch/job-definition.json", 30, id="ecs-agent-default"),
        pytest.param("gcp-batch/job.json", 15, id="its-stop-timeout"),
        pytest.param("sagemaker/create-training-job.json", 120, id="docker-stop-t120"),
        pytest.param("vertex-ai/custom-job.json", 15, id="not-documented"),
        pytest.param("compose/compose.yaml", 15, id="stop_grace_period"),
    ],
)
def test_the_job_is_told_no_more_grace_than_there_is(path: str, seconds: int) -> None:
    """TUNE_GRACE_SECONDS is at most what the platform leaves between its signal and SIGKILL."""
    platform = next(each for each in PLATFORMS if each.spec == path)
    assert float(platform.variables(read(path))["TUNE_GRACE_SECONDS"]) <= seconds


def test_containers_are_confined() -> None:
    """Wherever a spec can say so: read-only root, no capabilities, no new privileges, and scratch to write to."""
    batch = read("aws-batch/job-definition.json")["containerProperties"]
    assert batch["readonlyRootFilesystem"] is True
    assert batch["privileged"] is False
    assert batch["user"] == "10001:0"
    assert batch["mountPoints"][0]["containerPath"] == "/scratch"
    options = read("gcp-batch/job.json")["taskGroups"][0]["taskSpec"]["runnables"][1]["container"]["options"]
    assert "--read-only --cap-drop ALL --security-opt no-new-privileges" in options
    assert "--privileged" not in options
    service = read("compose/compose.yaml")["services"]["train"]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [each["target"] for each in service["volumes"]] == ["/scratch"]
