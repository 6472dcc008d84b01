"""cloud/iam: the policies are valid, suffice for what the job does in buckets, and hold nothing that it does not need.

moto evaluates the policies for every request here, with the limits of its evaluation: it answers 404 for a missing
object also without s3:ListBucket, and does not check that the source of a copy may be read.
"""

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from job.commands.demo.local_s3 import serve
from job.runtime.errors import AccessDeniedError
from job.storage.open import open_store
from tests.jobs import ROOT

IAM = ROOT / "cloud" / "iam"
INPUT, OUTPUT = "change-me-input", "change-me-output"  # the names in the policy, unchanged
USER = "job"
LARGE_BYTES = (16 << 20) + 1  # one more than goes up in one piece
NOW = {"patience_seconds": 0.0, "denied_patience_seconds": 0.0}
POLICY = json.loads((IAM / "job-policy.json").read_text())


def actions(statement: dict[str, Any]) -> list[str]:
    """A statement's actions; JSON may give a single one as a plain string."""
    named = statement["Action"]
    return [named] if isinstance(named, str) else named


NEEDED = {
    "list_objects_v2": {"s3:ListBucket"},
    "head_object": {"s3:GetObject", "s3:GetObjectVersion"},
    "get_object": {"s3:GetObject", "s3:GetObjectVersion"},
    "put_object": {"s3:PutObject"},
    "delete_object": {"s3:DeleteObject"},
    "copy": {"s3:GetObject", "s3:PutObject"},
    "copy_object": {"s3:GetObject", "s3:PutObject"},
    "create_multipart_upload": {"s3:PutObject"},
    "upload_part": {"s3:PutObject"},
    "complete_multipart_upload": {"s3:PutObject"},
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
}
"""What S3's documentation asks for each operation that job/storage calls."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """An S3 that enforces policies: its administrator's IAM and S3 clients."""

    iam: Any
    s3: Any

    def give(self, policy: dict[str, Any]) -> None:
        self.iam.put_user_policy(UserName=USER, PolicyName="policy", PolicyDocument=json.dumps(policy))


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """Two buckets that keep versions, and a user whose policy the tests set."""
    with serve() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        nowhere = tmp_path_factory.mktemp("aws") / "nothing"
        patch.setenv("AWS_CONFIG_FILE", str(nowhere))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nowhere))
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        boot = boto3.client("iam", endpoint_url=endpoint, aws_access_key_id="boot", aws_secret_access_key="boot")
        keys = {}
        for user in ("administrator", USER):
            boot.create_user(UserName=user)
            made = boot.create_access_key(UserName=user)["AccessKey"]
            keys[user] = {"aws_access_key_id": made["AccessKeyId"], "aws_secret_access_key": made["SecretAccessKey"]}
        everything = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}
        boot.put_user_policy(UserName="administrator", PolicyName="all", PolicyDocument=json.dumps(everything))
        enforce = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(enforce).close()
        account = Account(
            iam=boto3.client("iam", endpoint_url=endpoint, **keys["administrator"]),
            s3=boto3.client("s3", endpoint_url=endpoint, **keys["administrator"]),
        )
        for bucket in (INPUT, OUTPUT):
            account.s3.create_bucket(Bucket=bucket)
            account.s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        account.s3.put_object(Bucket=INPUT, Key="data/rows.jsonl", Body=b"{}\n")
        patch.setenv("AWS_ACCESS_KEY_ID", keys[USER]["aws_access_key_id"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", keys[USER]["aws_secret_access_key"])
        yield account


def steps(account: Account, directory: Path) -> dict[str, Callable[[], Any]]:
    """All that a run does with its stores, each step by a name."""
    inputs, outputs = open_store(f"s3://{INPUT}/data", **NOW), open_store(f"s3://{OUTPUT}/runs", **NOW)
    small, large = directory / "small", directory / "large"
    small.write_bytes(b"small")
    with large.open("wb") as file:
        file.truncate(LARGE_BYTES)
    for key in ("kept", "old"):
        account.s3.put_object(Bucket=OUTPUT, Key=f"runs/{key}", Body=b"kept")
    for key in ("runs/claim", "runs/none"):
        account.s3.delete_object(Bucket=OUTPUT, Key=key)
    begun = account.s3.create_multipart_upload(Bucket=OUTPUT, Key="runs/broken-off")
    assert begun["UploadId"]
    return {
        "list inputs": inputs.list_objects,
        "pin an input": lambda: inputs.head("rows.jsonl"),
        "fetch what is listed": lambda: inputs.download(inputs.list_objects()[0], directory / "listed"),
        "fetch what is pinned": lambda: inputs.download(inputs.head("rows.jsonl"), directory / "pinned"),
        "claim": lambda: outputs.create("claim", b"1"),
        "meet a claim": lambda: outputs.create("kept", b"1"),
        "read a record": lambda: outputs.read("kept"),
        "write a record": lambda: outputs.write("kept", b"kept"),
        "list records": lambda: outputs.list_objects("k"),
        "upload a small file": lambda: outputs.upload(small, "small"),
        "upload a large file": lambda: outputs.upload(large, "large"),
        "restore a checkpoint": lambda: outputs.download(outputs.head("kept"), directory / "restored"),
        "archive": lambda: outputs.copy("kept", "aside"),
        "retire a checkpoint": lambda: outputs.delete("old"),
        "remove unfinished uploads": lambda: outputs.remove_unfinished(""),
    }


def refused(account: Account, directory: Path) -> Iterator[str]:
    """The steps that end with AccessDeniedError under the policy in force."""
    for name, step in steps(account, directory).items():
        try:
            step()
        except AccessDeniedError:
            yield name


def test_the_policy_suffices(account: Account, tmp_path: Path) -> None:
    """With the policy, and versions kept, no step of a run is refused."""
    account.give(POLICY)
    assert list(refused(account, tmp_path)) == []


def without(statement: int, action: str) -> dict[str, Any]:
    """The policy less one action of one statement."""
    policy = json.loads(json.dumps(POLICY))
    left = [each for each in actions(policy["Statement"][statement]) if each != action]
    policy["Statement"][statement]["Action"] = left or ["s3:GetBucketWebsite"]
    return policy


@pytest.mark.parametrize(
    ("statement", "action"),
    [
        pytest.param(number, action, id=f"{statement['Sid']}-{action}")
        for number, statement in enumerate(POLICY["Statement"])
        for action in actions(statement)
    ],
)
def test_the_policy_is_minimal(account: Account, tmp_path: Path, statement: int, action: str) -> None:
    """Without any one of its actions some step of a run is refused."""
    account.give(without(statement, action))
    assert next(refused(account, tmp_path), None) is not None


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda: open_store(f"s3://{INPUT}", **NOW).write("data/rows.jsonl", b""), id="change-input"),
        pytest.param(lambda: open_store(f"s3://{INPUT}", **NOW).delete("data/rows.jsonl"), id="delete-input"),
        pytest.param(lambda: open_store(f"s3://{OUTPUT}", **NOW).write("else", b""), id="write-elsewhere"),
        pytest.param(lambda: open_store(f"s3://{OUTPUT}", **NOW).delete("else"), id="delete-elsewhere"),
        pytest.param(lambda: open_store(f"s3://{OUTPUT}", **NOW).read("else"), id="read-elsewhere"),
    ],
)
def test_the_policy_allows_nothing_else(account: Account, step: Callable[[], Any]) -> None:
    """Inputs cannot be changed, and outside its prefix the job can do nothing in the output bucket."""
    account.give(POLICY)
    with pytest.raises(AccessDeniedError):
        step()


def test_every_operation_of_the_job_has_its_permission() -> None:
    """A new S3 operation in job/storage must be named here with what it needs, and nothing else is in the policy."""
    source = "".join(path.read_text() for path in (ROOT / "job" / "storage").rglob("*.py"))
    called = set(re.findall(r"\bclient\.([a-z_0-9]+)\(", source)) - {"get_paginator"}
    called |= set(re.findall(r'get_paginator\("([a-z_0-9]+)"\)', source))
    assert called == set(NEEDED)
    allowed = {action for statement in POLICY["Statement"] for action in actions(statement)}
    assert allowed == set().union(*NEEDED.values())


@pytest.mark.parametrize("path", sorted(IAM.glob("*policy.json")), ids=lambda path: path.stem)
def test_policies_are_well_formed(account: Account, path: Path) -> None:
    """moto's grammar of policies accepts each of them, and not one with a misspelt element."""
    text = path.read_text()
    account.iam.create_policy(PolicyName=path.stem, PolicyDocument=text)
    with pytest.raises(ClientError, match="MalformedPolicyDocument"):
        account.iam.create_policy(PolicyName="typo", PolicyDocument=text.replace('"Effect"', '"Efect"'))


@pytest.mark.parametrize("path", sorted(IAM.glob("trust-*.json")), ids=lambda path: path.stem)
def test_trust_policies_are_well_formed_and_narrow(account: Account, path: Path) -> None:
    """Each names who may take the role, under a condition; moto accepts it, and not one with a misspelt element."""
    text = path.read_text()
    assert all(statement["Condition"] for statement in json.loads(text)["Statement"])
    account.iam.create_role(RoleName=path.stem, AssumeRolePolicyDocument=text)
    account.iam.update_assume_role_policy(RoleName=path.stem, PolicyDocument=text)  # moto checks only here
    with pytest.raises(ClientError, match="MalformedPolicyDocument"):
        account.iam.update_assume_role_policy(RoleName=path.stem, PolicyDocument=text.replace('"Action"', '"Actoin"'))
