"""The table of causes: servers, files and credentials that misbehave, each with its exit code and a true remedy."""

from __future__ import annotations

import datetime
import email.utils
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.runtime import process
from job.runtime.errors import JobError
from job.storage.base import Store
from job.storage.open import open_store
from tests.certificates import make_certificates
from tests.misbehaving import EMPTY, Answer, Answering, serve_answers
from tests.servers import SECRET_KEY, serve_proxy

ACTS: dict[str, Callable[[Store, Path], object]] = {
    "list": lambda store, _: store.list_objects(),
    "head": lambda store, _: store.head("key"),
    "read": lambda store, _: store.read("key"),
    "write": lambda store, _: store.write("key", b"data"),
    "create": lambda store, _: store.create("key", b"data"),
    "delete": lambda store, _: store.delete("key"),
    "copy": lambda store, _: store.copy("key", "target"),
    "upload": lambda store, path: store.upload(path, "key"),
    "abort": lambda store, _: store.remove_unfinished(""),
}
PATIENT = {"patience_seconds": 20, "denied_patience_seconds": 20}
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys, and nothing else of AWS, of a proxy or of this machine."""
    for name in process.variables():
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in zip(NAMES, ("AKIATEST", SECRET_KEY), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of what botocore asks by itself for credentials
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0.0)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that goes up in parts."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * (17 << 20))
    return path


def _store(**options: Any) -> Store:
    return open_store("s3://bucket/run", **{"patience_seconds": 0.05, "denied_patience_seconds": 0.0, **options})


def _ended(act: Callable[[], object]) -> JobError:
    with pytest.raises(JobError) as caught:
        act()
    assert SECRET_KEY not in str(caught.value)
    assert "Signature=" not in str(caught.value)
    return caught.value


class Shared:
    """One server in the place of S3, and one store: making a client takes a while. A test says what is answered."""

    def __init__(self, server: Answering, store: Any) -> None:
        self.server, self._store = server, store
        self.choose: Callable[[str, str, int], Answer] = lambda *_: EMPTY

    def __call__(self, choose: Callable[[str, str, int], Answer], **options: float) -> Store:
        """The store, which has never worked, with these answers from now on."""
        self.choose = choose
        self.server.seen.clear()
        bucket = self._store._bucket
        for name, value in {"patience_seconds": 0.05, "denied_patience_seconds": 0.02, **options}.items():
            setattr(bucket, name, value)
        bucket.connection.worked = False
        store: Store = self._store
        return store


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    """See `Shared`."""
    with serve_answers(lambda *seen: found.choose(*seen)) as server:  # noqa: PLW0108 - it changes
        found = Shared(server, open_store("s3://bucket/run"))
        yield found


@pytest.fixture
def answering(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """The same, at the endpoint that the environment names."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", shared.server.endpoint)
    return shared


def _ago(**time: int) -> str:
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) - datetime.timedelta(**time), usegmt=True)


DENIED = "User: arn:aws:iam::1:user/u is not authorized to perform: kms:Decrypt on resource: arn:aws:kms:::key/quota"
REPLIES = [
    # (what is done, the reply, exit code, words of the message, words of the remedy, whether another try was made)
    ("list", Answer.page(), 78, "not S3: HTTP 200, text/html from 'Console'", "AWS_ENDPOINT_URL_S3.*9001", True),
    ("list", Answer(), 78, "not S3: HTTP 200.*empty", "AWS_ENDPOINT_URL_S3", True),
    ("list", Answer(body=b"<html><body>Sign in</body></html>"), 78, "not S3", "login page", True),
    ("list", Answer(headers={"Content-Type": "application/json"}, body=b"{}"), 78, "application/json", "console", True),
    ("list", Answer(body=b"<?xml version='1.0'?><ListBucketResult><Name>b</Na"), 78, "ListBucketResult", "proxy", True),
    (
        "list",
        Answer(body=EMPTY.body.replace(b"<Name>", b"<Contents><Size>1</Size></Contents><Name>")),
        78,
        "S3",
        "",
        True,
    ),
    ("list", Answer(body=EMPTY.body.replace(b"<Name>", b"<MaxKeys>x</MaxKeys><Name>")), 78, "not S3", "", True),
    (
        "list",
        Answer(status=302, headers={"Location": "https://login.example/"}),
        78,
        "302",
        "AWS_ENDPOINT_URL_S3",
        True,
    ),
    ("write", Answer.page(), 78, "PutObject on s3://bucket/run/key.*not S3", "AWS_ENDPOINT_URL_S3", True),
    ("write", Answer.page(502), 74, r"retried.*502", "PATIENCE", True),
    ("list", Answer.page(403), 77, "denied.*not S3.*403", "proxy, gateway or firewall", True),
    ("write", Answer.page(413), 78, "too large.*413", "client_max_body_size", False),
    ("list", Answer(status=404), 78, "no such place", "without a bucket", True),
    ("list", Answer(status=407), 77, "proxy asks for a user", "NO_PROXY", True),
    (
        "list",
        Answer(status=400, body=b"Client sent an HTTP request to an HTTPS server.\n"),
        78,
        "only TLS",
        "https://",
        False,
    ),
    ("list", Answer.error(404, "NoSuchBucket"), 65, "'bucket' does not exist", "AWS_ENDPOINT_URL_S3", False),
    ("list", Answer.error(400, "MadeUp", "no"), 78, r"rejected: MadeUp \(no\)", "documentation", True),
    (
        "list",
        Answer.error(403, "RequestTimeTooSkewed", Date=_ago(hours=2)),
        74,
        r"\d:\d\d:\d\d ahead of the store",
        "NTP",
        True,
    ),
    ("list", Answer.error(403, "RequestTimeTooSkewed", Date=_ago(hours=-26)), 74, "1 day, .*behind", "clock", True),
    ("list", Answer.error(403, "RequestTimeTooSkewed"), 74, "this machine's clock says", "clock", True),
    ("list", Answer.error(400, "ExpiredToken"), 77, "AWS_SESSION_TOKEN has expired", "workload identity", True),
    ("list", Answer.error(403, "InvalidAccessKeyId"), 77, "does not know the credentials", "this very store", True),
    ("list", Answer.error(403, "SignatureDoesNotMatch"), 77, "signature is wrong", "AWS_SECRET_ACCESS_KEY", True),
    ("list", Answer.error(403, "AccessDenied"), 77, "denied.*Credentials tried: `env`", "s3:ListBucket", True),
    ("read", Answer.error(403, "AccessDenied", DENIED), 77, "denied", "Give this identity kms:Decrypt", True),
    (
        "write",
        Answer.error(403, "AccessDenied", f"{DENIED} with an explicit deny in a bucket policy"),
        77,
        "",
        "deny",
        True,
    ),
    ("read", Answer.error(400, "KMS.DisabledException"), 77, "KMS key", "Enable the key", True),
    ("read", Answer.error(403, "InvalidObjectState"), 65, "s3://bucket/run/key is archived", "restore-object", False),
    (
        "read",
        Answer.error(400, "InvalidRequest", "The object was stored using a form of Server Side Encryption."),
        65,
        "s3://bucket/run/key is encrypted with a customer's key",
        "SSE-KMS",
        False,
    ),
    (
        "list",
        Answer.error(400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-central-1'"),
        78,
        "another region",
        "AWS_DEFAULT_REGION=eu-central-1",
        False,
    ),
    (
        "list",
        Answer.error(301, "PermanentRedirect", more="<Endpoint>bucket.s3.eu-west-1.amazonaws.com</Endpoint>"),
        78,
        "another region",
        "AWS_DEFAULT_REGION=eu-west-1",
        False,
    ),
    (
        "write",
        Answer.error(400, "IllegalLocationConstraintException"),
        78,
        "another region",
        "AWS_DEFAULT_REGION",
        False,
    ),
    (
        "write",
        Answer.error(
            400, "InvalidArgument", "Unsupported header 'x-amz-sdk-checksum-algorithm' received for this API call."
        ),
        78,
        "uploads with checksums",
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
        False,
    ),
    ("write", Answer.error(501, "NotImplemented", "x-amz-checksum-sha256"), 78, "checksums", "when_required", False),
    ("write", Answer.error(501, "NotImplemented"), 78, "rejected", "documentation", True),
    ("write", Answer.error(403, "QuotaExceeded"), 74, "quota is used up", "Raise the quota", True),
    ("write", Answer.error(400, "XMinioAdminBucketQuotaExceeded"), 74, "quota", "delete objects", True),
    (
        "write",
        Answer.error(507, "XMinioStorageFull", "Storage backend has reached its limit"),
        74,
        "no room",
        "quota",
        True,
    ),
    (
        "write",
        Answer.error(403, "AccessDenied", "Cannot upload files, storage cap exceeded."),
        74,
        "quota",
        "quota",
        True,
    ),
    (  # Backblaze: alangrainger/share-note#63
        "write",
        Answer.error(403, "AccessDenied", "Transaction cap exceeded, see the Caps & Alerts page to increase your cap."),
        74,
        "quota",
        "quota",
        True,
    ),
    (  # no hash was sent that could differ: cloudfoundry/bosh-s3cli#65, boto/boto3#3738
        "write",
        Answer.error(400, "XAmzContentSHA256Mismatch", "The Content-SHA256 you specified did not match."),
        78,
        "uploads with checksums",
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
        False,
    ),
    (  # damage on the way, although it names Content-MD5
        "write",
        Answer.error(400, "BadDigest", "The Content-MD5 you specified did not match what we received."),
        74,
        "retried.*BadDigest",
        "again",
        True,
    ),
    (  # Alibaba OSS: star-whale/starwhale#1178
        "list",
        Answer.error(403, "SecondLevelDomainForbidden", "Please use virtual hosted style to access."),
        78,
        "virtual-hosted style",
        "addressing_style = virtual",
        False,
    ),
    (  # Volcano TOS: apache/opendal#6549
        "list",
        Answer.error(403, "InvalidPathAccess", "Forbidden path to access server."),
        78,
        "virtual-hosted style",
        "addressing_style = virtual",
        False,
    ),
    (
        "delete",
        Answer.error(403, "AccessDenied", "because object protected by object lock."),
        77,
        "locked",
        "object lock",
        False,
    ),
    (
        "write",
        Answer.error(400, "ObjectLocked", "Object is WORM protected"),
        77,
        "s3://bucket/run/key is locked",
        "",
        False,
    ),
    (
        "write",
        Answer.error(400, "InvalidRequest", "Content-MD5 HTTP header is required for Put Object with Object Lock"),
        78,
        "only uploads with a checksum",
        "Unset AWS_REQUEST_CHECKSUM",
        False,
    ),
    ("write", Answer.error(400, "EntityTooLarge"), 78, "too large", "16 MiB", False),
    ("list", Answer.error(403, "AllAccessDisabled"), 77, "account is not active", "bills", False),
    ("write", Answer.error(412, "PreconditionFailed"), 78, "rejected: PreconditionFailed", "", True),
    ("abort", Answer.error(501, "NotImplemented"), 78, "rejected", "", True),
    ("copy", Answer.error(403, "AccessDenied"), 77, "HeadObject on s3://bucket/run/key", "s3:ListBucket", True),
]


@pytest.mark.parametrize(
    ("act", "answer", "code", "says", "remedy", "again"),
    [pytest.param(*row, id=f"{row[0]}-{row[1].status}-{number}") for number, row in enumerate(REPLIES)],
)
def test_replies(
    answering: Shared, tmp_path: Path, act: str, answer: Answer, code: int, says: str, remedy: str, again: bool
) -> None:
    """Each reply ends with its code, its words and its remedy. What cannot get better is not tried again: a minute of
    patience would be seen."""
    store = answering(lambda *_: answer, **({} if again else PATIENT))
    ended = _ended(lambda: ACTS[act](store, tmp_path))
    assert ended.exit_code == code, ended
    assert re.search(says, ended.message), ended.message
    assert re.search(remedy, ended.remedy), ended.remedy


def test_a_copy_that_is_denied(answering: Shared, tmp_path: Path) -> None:
    """A copy that is denied where the object may be read: the remedy names what a copy needs besides."""
    store = answering(
        lambda method, *_: Answer(headers={"ETag": '"e"'}) if method == "HEAD" else Answer.error(403, "AccessDenied")
    )
    ended = _ended(lambda: ACTS["copy"](store, tmp_path))
    assert (ended.exit_code, "s3:GetObjectTagging" in ended.remedy) == (77, True), ended
    assert "CopyObject on s3://bucket/run/target" in ended.message


@pytest.mark.parametrize(
    ("code", "exit_code", "says"),
    [("InvalidObjectState", 65, "archived"), ("ExpiredToken", 77, "expired"), ("KMS.DisabledException", 77, "KMS key")],
)
def test_a_head_without_a_reason(answering: Shared, tmp_path: Path, code: str, exit_code: int, says: str) -> None:
    """A refused HEAD has no body: a GET of one byte says why."""
    store = answering(lambda method, *_: Answer(status=400) if method == "HEAD" else Answer.error(400, code))
    for act in ("head", "copy"):
        ended = _ended(lambda act=act: ACTS[act](store, tmp_path))
        assert (ended.exit_code, says in ended.message) == (exit_code, True), ended


def test_a_head_that_stays_without_a_reason(answering: Shared, tmp_path: Path) -> None:
    """Where the GET gives none either, it is a refusal, with the permission that a HEAD needs."""
    store = answering(lambda *_: Answer(status=403))
    ended = _ended(lambda: store.head("key"))
    assert (ended.exit_code, "s3:ListBucket" in ended.remedy) == (77, True), ended


@pytest.mark.parametrize(
    "answer",
    [Answer.page(), Answer(), Answer(body=b"{}"), Answer(body=b"<ListBuck")],
    ids=["page", "empty", "json", "cut"],
)
def test_a_store_that_worked_before(answering: Shared, answer: Answer) -> None:
    """What would be a wrong address at first is an outage of a store that has answered: it is waited for, then 74."""
    store = answering(lambda *seen: EMPTY if seen[2] in {1, 3} else answer, patience_seconds=0.6)
    assert store.list_objects() == []
    assert store.list_objects() == []  # after a bad reply
    assert _ended(store.list_objects).exit_code == 74


def test_signatures_refused_only_with_checksums(answering: Shared) -> None:
    """Where listings are accepted and uploads with a checksum are not, the checksum is named."""
    store = answering(lambda method, *_: EMPTY if method == "GET" else Answer.error(403, "SignatureDoesNotMatch"))
    store.list_objects()
    ended = _ended(lambda: store.write("key", b"data"))
    assert (ended.exit_code, "when_required" in ended.remedy) == (78, True), ended


def test_a_multipart_upload_without_fields(answering: Shared, large: Path) -> None:
    """Replies without the upload's id, or without the parts' ETags, are none of S3's."""
    store = answering(lambda *_: Answer(body=b"<?xml version='1.0'?><InitiateMultipartUploadResult/>"))
    assert _ended(lambda: store.upload(large, "key")).exit_code == 78
    begun = (
        b"<?xml version='1.0'?><InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
    )
    store = answering(lambda method, *_: Answer(body=begun) if method == "POST" else Answer())
    ended = _ended(lambda: store.upload(large, "key"))
    assert ended.exit_code in {74, 78}
    assert "s3://bucket/run/key" in ended.message


def test_an_empty_object_has_no_range(answering: Shared) -> None:
    """S3 answers 416 to a range of an empty object: its start is empty."""
    assert answering(lambda *_: Answer.error(416, "InvalidRange")).read_start("key", 100) == b""


def test_a_delete_marker(answering: Shared) -> None:
    """A version that is a delete marker is an object that is not there."""
    assert answering(lambda *_: Answer(status=405, headers={"x-amz-delete-marker": "true"})).head("key") is None


def test_an_upload_that_is_aborted_meanwhile(answering: Shared) -> None:
    """What somebody else removed need not be removed."""
    listing = (
        b"<?xml version='1.0'?><ListMultipartUploadsResult><Upload><Key>run/a</Key><UploadId>1</UploadId></Upload>"
        b"<IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
    )
    store = answering(lambda method, *_: Answer(body=listing) if method == "GET" else Answer.error(404, "NoSuchUpload"))
    assert store.remove_unfinished("") == 1


@pytest.mark.parametrize(
    ("status", "code", "more"),
    [
        (501, "NotImplemented", ""),
        (400, "NotImplemented", "<Header>If-None-Match</Header>"),  # Alibaba OSS
        (400, "InvalidArgument", ""),
    ],
)
def test_conditions_that_are_not_known(answering: Shared, status: int, code: str, more: str) -> None:
    """A store that refuses `If-None-Match` is one that ignores it: the object is written, each time."""
    store = answering(
        lambda *seen: Answer.error(status, code, more=more) if seen[2] % 2 else Answer(headers={"ETag": '"1"'})
    )
    assert store.create("key", b"one") is True
    assert store.create("key", b"two") is True
    assert [method for method, _ in answering.server.seen] == ["PUT"] * 4


def test_a_store_that_refuses_more_than_conditions(answering: Shared) -> None:
    """Where the plain write is refused too, the reason is that one's."""
    store = answering(lambda *_: Answer.error(501, "NotImplemented", "not implemented: x-amz-checksum-sha256"))
    ended = _ended(lambda: store.create("key", b"data"))
    assert "when_required" in ended.remedy


ENVIRONMENTS = [
    # (variables, what the files hold, exit code, words of the message, words of the remedy)
    ({"AWS_PROFILE": "nobody"}, {}, 78, "nobody", "AWS_PROFILE"),
    ({"AWS_CONFIG_FILE": "{f}"}, {"f": "region = x\n"}, 78, "line 1", "section"),
    (
        {"AWS_SHARED_CREDENTIALS_FILE": "{f}"},
        {"f": "aws_secret_access_key = " + SECRET_KEY},
        78,
        "{f}",
        "CREDENTIALS_FILE",
    ),
    ({"AWS_CONFIG_FILE": "{f}"}, {"f": "[default]\na=b\n[default]\na=c\n"}, 78, "line 3", "AWS_CONFIG_FILE"),
    (
        {"AWS_CONFIG_FILE": "{f}"},
        {"f": "[default]\ns3 = path\n"},
        78,
        "does not accept its configuration",
        "AWS_CONFIG_FILE",
    ),
    ({"AWS_CONFIG_FILE": "{f}"}, {"f": "[default]\ns3 =\n  addressing_style = p\n"}, 78, "addressing style p", "AWS_"),
    ({"AWS_REQUEST_CHECKSUM_CALCULATION": "never"}, {}, 78, "request_checksum_calculation", "AWS_"),
    ({"AWS_DEFAULTS_MODE": "fast"}, {}, 78, "defaults mode: fast", "AWS_"),
    ({"AWS_DEFAULT_REGION": "US East"}, {}, 78, "region is not valid", "AWS_DEFAULT_REGION"),
    ({"AWS_DEFAULT_REGION": "us-east-1\n"}, {}, 78, "line break", "AWS_DEFAULT_REGION"),
    ({"AWS_ENDPOINT_URL_S3": "minio:9000"}, {}, 78, "minio:9000", "https://"),
    ({"AWS_ENDPOINT_URL_S3": "//minio:9000"}, {}, 78, "not a URL", "https://"),
    ({"AWS_ENDPOINT_URL_S3": "htp://minio"}, {}, 78, "not a URL", "https://"),
    ({"AWS_ENDPOINT_URL_S3": "http://minio:port"}, {}, 78, "not a URL", "https://"),
    ({"AWS_ENDPOINT_URL_S3": "http://[::1"}, {}, 78, "not a URL", "https://"),
    ({"AWS_ENDPOINT_URL_S3": "http://minio "}, {}, 78, "not a URL", "nothing behind"),
    ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9/bucket"}, {}, 78, "ends with the bucket", "the store alone"),
    ({"AWS_ENDPOINT_URL_S3": "https://bucket.s3.amazonaws.com"}, {}, 78, "begins with the bucket", "the store alone"),
    ({"AWS_ENDPOINT_URL_S3": "http://no-such-host.invalid"}, {}, (78, 74), "no-such-host", "AWS_ENDPOINT_URL_S3|again"),
    ({"HTTP_PROXY": "not a url"}, {}, 78, "proxy's address", "http://host:port"),
    ({"HTTP_PROXY": "socks5://127.0.0.1:9"}, {}, 78, "SOCKS", "http://host:port"),
    ({"HTTP_PROXY": "http://127.0.0.1:9"}, {}, 74, "Failed to connect to proxy", "again"),
    ({"AWS_ACCESS_KEY_ID": "AKIATEST\n"}, {}, 78, "AWS_ACCESS_KEY_ID has .*line break", "echo -n"),
    ({"AWS_ACCESS_KEY_ID": "AKIATEST "}, {}, 78, "AWS_ACCESS_KEY_ID has white space", "echo -n"),
    ({"AWS_ACCESS_KEY_ID": '"AKIATEST"'}, {}, 78, "quotes", "quotes"),
    ({"AWS_ACCESS_KEY_ID": "AKIA“"}, {}, 78, "other characters", "Write it again"),
    ({"AWS_SECRET_ACCESS_KEY": SECRET_KEY + "\n"}, {}, 78, "AWS_SECRET_ACCESS_KEY has white space", "echo -n"),
    ({"AWS_SESSION_TOKEN": "token\n"}, {}, 78, "AWS_SESSION_TOKEN has", "echo -n"),
    ({"AWS_SECRET_ACCESS_KEY": ""}, {}, 78, "Half of the credentials", "both"),
]
FOUND = [
    # The same, without keys in the environment.
    ({}, {}, 77, "no credentials.*looked at env", "AWS_ACCESS_KEY_ID"),
    ({"AWS_SHARED_CREDENTIALS_FILE": "{f}"}, {"f": "[default]\naws_access_key_id=a\n"}, 78, "Half of", "both"),
    (
        {"AWS_SHARED_CREDENTIALS_FILE": "{f}"},
        {"f": '[default]\naws_access_key_id="a"\naws_secret_access_key=b\n'},
        78,
        "aws_access_key_id of the credentials from `shared-credentials-file`",
        "quotes",
    ),
    ({"AWS_CONFIG_FILE": "{f}"}, {"f": "[default]\ncredential_process=/no/such\n"}, 78, "/no/such of", "Mount it"),
    ({"AWS_CONFIG_FILE": "{f}"}, {"f": "[default]\ncredential_process=/bin/echo hi\n"}, 78, "not valid", "profile"),
    (
        {"AWS_CONFIG_FILE": "{f}"},
        {"f": "[default]\ncredential_process=/bin/echo []\n"},
        77,
        "cannot be used",
        "credential_process",
    ),
    (
        {"AWS_CONFIG_FILE": "{f}"},
        {"f": "[default]\nrole_arn=arn:aws:iam::1:role/x\nsource_profile=nobody\n"},
        78,
        "nobody",
        "Correct the profile",
    ),
    (
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/no/token", "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x"},
        {},
        78,
        "/no/token of AWS_WEB_IDENTITY_TOKEN_FILE",
        "service account",
    ),
    (  # Docker makes a directory where a mounted file is missing (botocore#2351)
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/tmp", "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x"},
        {},
        78,
        "/tmp of AWS_WEB_IDENTITY_TOKEN_FILE",
        "Mount it",
    ),
    ({"AWS_WEB_IDENTITY_TOKEN_FILE": "{f}"}, {"f": "token"}, 78, "no role ARN", "AWS_ROLE_ARN"),
    (
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "{f}", "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x"}
        | {"AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9"},
        {"f": "a-token"},
        74,
        "service that gives credentials",
        "egress",
    ),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:9/x"}, {}, 74, "service that gives", "NO_PROXY"),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://example.com/x"}, {}, 78, "example.com", "Correct"),
    (
        {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:9/x",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/no/t",
        },
        {},
        78,
        "/no/t of AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "Mount it",
    ),
    (
        {"AWS_CONFIG_FILE": "{f}"},
        {"f": "[default]\nsso_start_url=https://x\nsso_region=us-east-1\nsso_account_id=1\nsso_role_name=r\n"},
        77,
        "SSO",
        "browser",
    ),
]


def _cases(rows: list[Any]) -> list[Any]:
    return [pytest.param(*row, id=f"{number}-{'-'.join(row[0]) or 'nothing'}") for number, row in enumerate(rows)]


def _environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], files: dict[str, str]
) -> dict[str, str]:
    places = {name: str(tmp_path / name) for name in files}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(**places) if "{" in value else value)
    return places


@pytest.mark.parametrize(("variables", "files", "code", "says", "remedy"), _cases(ENVIRONMENTS))
def test_environments(
    answering: Shared,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variables: dict[str, str],
    files: dict[str, str],
    code: Any,
    says: str,
    remedy: str,
) -> None:
    """A mistake in boto3's configuration, in an address or a key ends with 78, before anything is sent."""
    answering(lambda *_: EMPTY)
    places = _environment(monkeypatch, tmp_path, variables, files)
    ended = _ended(lambda: _store().list_objects())
    assert ended.exit_code in (code if isinstance(code, tuple) else (code,)), ended
    assert re.search(says.format(**places) if "{" in says else says, ended.message), ended.message
    assert re.search(remedy, ended.remedy), ended.remedy
    assert answering.server.seen == []


@pytest.mark.parametrize(("variables", "files", "code", "says", "remedy"), _cases(FOUND))
def test_credentials_by_source(
    answering: Shared,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variables: dict[str, str],
    files: dict[str, str],
    code: int,
    says: str,
    remedy: str,
) -> None:
    """Credentials that are looked for and not found, or not right, are named by their source."""
    for name in NAMES:
        monkeypatch.delenv(name)
    test_environments(answering, monkeypatch, tmp_path, variables, files, code, says, remedy)


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (Answer(body=b"<html>"), 77, "cannot be used"),
        (Answer(body=b"{}"), 77, "cannot be used"),
        (Answer(body=b"[]"), 77, "cannot be used"),
        (Answer(status=404), 77, "cannot be used"),
    ],
    ids=str,
)
def test_a_container_without_credentials(
    answering: Shared, monkeypatch: pytest.MonkeyPatch, answer: Answer, code: int, says: str
) -> None:
    """The service for credentials answers with something else."""
    for name in NAMES:
        monkeypatch.delenv(name)
    answering(lambda *_: answer)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{answering.server.endpoint}/x")
    ended = _ended(lambda: _store().list_objects())
    assert (ended.exit_code, says in ended.message) == (code, True), ended


def test_a_role_that_does_not_trust(answering: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """STS's refusal is about the role, not about the bucket."""
    for name in NAMES:
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("a-token")
    refused = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>Not authorized</Message></Error></ErrorResponse>"
    answering(lambda *_: Answer(status=403, body=refused.encode()))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", answering.server.endpoint)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    ended = _ended(lambda: _store().list_objects())
    assert ended.exit_code == 77
    assert "The role does not give credentials" in ended.message
    assert "trust policy" in ended.remedy


def test_nothing_of_a_bad_key_is_logged(answering: Shared, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A key with a line break is named, and neither it nor a signature stands anywhere."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRETID\n")
    answering(lambda *_: EMPTY)
    ended = _ended(lambda: _store().list_objects())
    assert "AKIASECRETID" not in str(ended) + "".join(capsys.readouterr())


CERTIFICATES = [
    ({"days": (-3, -1)}, True, 74, "has expired; this machine's clock says 20", "Renew"),
    ({"days": (1, 3)}, True, 74, "not valid yet", "clock"),
    ({"host": "store.example"}, True, 78, "another name", "AWS_ENDPOINT_URL_S3"),
    ({"host": "127.0.0.2"}, True, 78, "another name", "AWS_ENDPOINT_URL_S3"),
    ({"own": True}, False, 78, "signed by itself", "this very certificate"),
    ({}, False, 78, "not trusted", "Point AWS_CA_BUNDLE at the CA"),
]


@pytest.mark.parametrize(
    ("kind", "trusted", "code", "says", "remedy"), CERTIFICATES, ids=[str(row[0]) for row in CERTIFICATES]
)
def test_certificates(
    moto: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: dict[str, Any],
    trusted: bool,
    code: int,
    says: str,
    remedy: str,
) -> None:
    """A certificate that is not accepted is named by what is wrong with it; only a CA that is missing asks for one."""
    made, other = make_certificates(tmp_path / "made", **kind), make_certificates(tmp_path / "other")
    monkeypatch.setenv("AWS_CA_BUNDLE", str((made if trusted else other) / "ca.pem"))
    with serve_proxy(moto, lambda _: None, tls=made) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        ended = _ended(lambda: _store().list_objects())
    assert (ended.exit_code, says in ended.message, remedy in ended.remedy) == (code, True, True), ended


@pytest.mark.parametrize("content", [None, "", "no certificate", "directory"], ids=str)
def test_a_ca_bundle_that_is_none(
    answering: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    """It is named at once, where TLS is spoken."""
    bundle = tmp_path if content == "directory" else tmp_path / "ca.pem"
    if content not in {None, "directory"}:
        bundle.write_text(content or "")
    answering(lambda *_: EMPTY)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", answering.server.endpoint.replace("http", "https"))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    ended = _ended(lambda: _store(**PATIENT).list_objects())
    assert (ended.exit_code, "AWS_CA_BUNDLE" in ended.remedy) == (78, True), ended


def test_tls_where_none_is_spoken(answering: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port without TLS is named."""
    answering(lambda *_: EMPTY)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", answering.server.endpoint.replace("http", "https"))
    ended = _ended(lambda: _store().list_objects())
    assert (ended.exit_code, "http://" in ended.remedy) == (78, True), ended


@pytest.mark.parametrize(("status", "code"), [(407, 77), (403, 77), (404, 78), (502, 74)])
def test_a_proxy_that_opens_no_tunnel(
    answering: Shared, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    """What a proxy answers to CONNECT decides."""
    answering(lambda *_: Answer(status=status))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.invalid")
    monkeypatch.setenv("HTTPS_PROXY", answering.server.endpoint)
    ended = _ended(lambda: _store().list_objects())
    assert ended.exit_code == code, ended
    assert code == 74 or "NO_PROXY" in ended.remedy


@pytest.mark.parametrize(("ranges", "direct"), [("10.0.0.0/8,127.0.0.0/8", True), (".svc,10.0.0.0/8", False)])
def test_ranges_in_no_proxy(answering: Shared, monkeypatch: pytest.MonkeyPatch, ranges: str, direct: bool) -> None:
    """An endpoint inside a range of NO_PROXY is asked without the proxy, as Go's programs and curl do it."""
    answering(lambda *_: EMPTY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", ranges)
    process.expand_no_proxy()
    if direct:
        assert _store().list_objects() == []
    else:
        assert _ended(lambda: _store().list_objects()).exit_code == 74
    assert bool(answering.server.seen) is direct
