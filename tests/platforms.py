"""The specs in cloud/ and what their platforms say of them: botocore's models, client libraries, published schemas."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import yaml
from botocore.validate import ParamValidator
from google.cloud.batch_v1.types import Job
from google.protobuf.json_format import ParseError

from tests.jobs import ROOT

CLOUD = ROOT / "cloud"
SCHEMAS = ROOT / "tests" / "schemas"
REJECTIONS = (AssertionError, ParseError, jsonschema.ValidationError, subprocess.CalledProcessError)


def read(path: str) -> Any:
    """A spec as plain values; YAML reads JSON too."""
    return yaml.safe_load((CLOUD / path).read_text())


# What each platform says of a spec: nothing, or an error.


def aws(service: str, operation: str) -> Callable[[Any], None]:
    """botocore's model of an operation: names and types by its validator, which skips enums, patterns and limits."""

    def check(spec: Any) -> None:
        shape = botocore.session.get_session().get_service_model(service).operation_model(operation).input_shape
        problems = ParamValidator().validate(spec, shape).generate_report()
        assert not problems, problems
        inside_limits(spec, shape)

    return check


def inside_limits(value: Any, shape: Any) -> None:
    """The rest of the model: enums, patterns, lengths and ranges."""
    limits = shape.metadata
    size = value if isinstance(value, int) else len(value)
    assert limits.get("min", size) <= size <= limits.get("max", size), (shape.name, value)
    assert value in (getattr(shape, "enum", None) or [value]), (shape.name, value)
    if "pattern" in limits and r"\p" not in limits["pattern"]:  # Python has no classes of Unicode properties
        assert re.fullmatch(limits["pattern"], value), (shape.name, value)
    if shape.type_name == "structure":
        for name, part in value.items():
            inside_limits(part, shape.members[name])
    elif shape.type_name == "list":
        for part in value:
            inside_limits(part, shape.member)
    elif shape.type_name == "map":
        for name, part in value.items():
            inside_limits(name, shape.key)
            inside_limits(part, shape.value)


def google_batch(spec: Any) -> None:
    """The client library's own message types, which refuse unknown names, other types and unknown enum values."""
    Job.from_json(json.dumps(spec), ignore_unknown_fields=False)


def vertex(spec: Any) -> None:
    """The API's discovery document, as a schema (tests/schemas/make.py)."""
    jsonschema.validate(spec, json.loads((SCHEMAS / "vertex.json").read_text()))


def skypilot(spec: Any) -> None:
    """SkyPilot's own two schemas, as strict as its server (tests/schemas/make.py)."""
    schemas = json.loads((SCHEMAS / "skypilot.json").read_text())
    jsonschema.validate(spec, schemas["task"])
    jsonschema.validate(spec["resources"], schemas["resources"])


def compose(spec: Any) -> None:
    """The Compose Specification's schema, which check-jsonschema carries."""
    program = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run(
        [program, "--builtin-schema", "vendor.compose-spec", "-"], input=json.dumps(spec), text=True, check=True
    )


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A spec with its judge, where its image stands, and two places to spoil: a name and a value."""

    spec: str
    check: Callable[[Any], None]
    image: str
    name: str
    value: str
    other: Any = "many"
    variables: Callable[[Any], dict[str, str]] = lambda _: {}


def pairs(variables: Any) -> dict[str, str]:
    return {each["name"]: each["value"] for each in variables}


def from_env_file() -> dict[str, str]:
    lines = (CLOUD / "job.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


GROUP = "taskGroups.0.taskSpec"
CONTAINER = "jobSpec.workerPoolSpecs.0.containerSpec"
PLATFORMS = [
    Platform(
        spec="aws-batch/job-definition.json",
        check=aws("batch", "RegisterJobDefinition"),
        image="containerProperties.image",
        name="containerProperties.linuxParameters.sharedMemorySize",
        value="containerProperties.linuxParameters.sharedMemorySize",
        variables=lambda spec: (
            pairs(spec["containerProperties"]["environment"])
            | pairs(read("aws-batch/submit-job.json")["containerOverrides"]["environment"])
        ),
    ),
    Platform(
        spec="aws-batch/submit-job.json",
        check=aws("batch", "SubmitJob"),
        image="",
        name="containerOverrides.environment",
        value="containerOverrides.environment.0.value",
        other=8,
    ),
    Platform(
        spec="sagemaker/create-training-job.json",
        check=aws("sagemaker", "CreateTrainingJob"),
        image="AlgorithmSpecification.TrainingImage",
        name="StoppingCondition.MaxWaitTimeInSeconds",
        value="ResourceConfig.InstanceType",
        other="ml.g5.tiny",
        variables=lambda spec: spec["Environment"],
    ),
    Platform(
        spec="gcp-batch/job.json",
        check=google_batch,
        image=f"{GROUP}.runnables.1.container.imageUri",
        name=f"{GROUP}.lifecyclePolicies.0.actionCondition.exitCodes",
        value=f"{GROUP}.lifecyclePolicies.0.action",
        other="FAIL_TASKS",
        variables=lambda spec: spec["taskGroups"][0]["taskSpec"]["runnables"][1]["environment"]["variables"],
    ),
    Platform(
        spec="vertex-ai/custom-job.json",
        check=vertex,
        image=f"{CONTAINER}.imageUri",
        name="jobSpec.scheduling.restartJobOnWorkerRestart",
        value="jobSpec.scheduling.timeout",
        variables=lambda spec: pairs(spec["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["env"]),
    ),
    Platform(
        spec="skypilot/task.yaml",
        check=skypilot,
        image="envs.IMAGE",
        name="resources.job_recovery.recover_on_exit_codes",
        value="resources.job_recovery.recover_on_exit_codes",
        variables=lambda spec: spec["envs"],
    ),
    Platform(
        spec="compose/compose.yaml",
        check=compose,
        image="services.train.image",
        name="services.train.shm_size",
        value="services.train.cap_drop",
        variables=lambda spec: spec["services"]["train"]["environment"] | from_env_file(),
    ),
]
LIBRARYLESS = ("azure-ml/job.yaml", "runpod/pod.json")
