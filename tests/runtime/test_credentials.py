"""Addresses are shown without passwords and signatures; environments are passed on without credentials."""

import pytest

from job.config import environment as env
from job.runtime import credentials
from job.runtime.credentials import shown
from job.runtime.errors import ConfigError, StorageError, as_job_error
from job.storage.open import open_store

SIGNED = (
    "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA1%2F20261128%2Fs3"
    "&X-Amz-Date=20261128T000000Z&X-Amz-Security-Token=IQoJb3%2F%3D&X-Amz-Signature=0a1b2c"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("https://user:pass@host:9000/a", "https://***@host:9000/a", id="user and password"),
        pytest.param("https://tok@host", "https://***@host", id="a token as the user"),
        pytest.param("redis://:pw@host/0", "redis://***@host/0", id="no user"),
        pytest.param("https://u:p@ss@host/a@b", "https://***@host/a@b", id="an @ in the password and one in the path"),
        pytest.param("https://u:pa/ss?w#d@host/a", "https://***@host/a", id="characters that should be quoted"),
        pytest.param("s3://KEY:secret@bucket/a", "s3://***@bucket/a", id="S3"),
        pytest.param("'https://u:p@a','https://v:q@b'", "'https://***@a','https://***@b'", id="two"),
        pytest.param(r"https:\/\/u:p@a\/b", r"https:\/\/***@a\/b", id="as some write JSON"),
        pytest.param(
            f"for url: {SIGNED} (403)",
            "for url: https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=***"
            "&X-Amz-Date=20261128T000000Z&X-Amz-Security-Token=***&X-Amz-Signature=*** (403)",
            id="presigned",
        ),
        pytest.param(
            "/k?AWSAccessKeyId=AKIA1&Signature=a%2Fb%3D&Expires=1",
            "/k?AWSAccessKeyId=***&Signature=***&Expires=1",
            id="presigned by an old version",
        ),
        pytest.param("https://a.blob/c?sv=2026&sig=x%3D&se=2027", "https://a.blob/c?sv=2026&sig=***&se=2027", id="SAS"),
        pytest.param("s3://b/k?token=abc", "s3://b/k?token=***", id="a token"),
        pytest.param("https://g/a?private_token=abc", "https://g/a?private_token=***", id="GitLab"),
        pytest.param(
            "https://b.tos/k?X-Tos-Credential=a&X-Tos-Signature=0a",
            "https://b.tos/k?X-Tos-Credential=***&X-Tos-Signature=***",
            id="Volcengine",
        ),
        pytest.param(
            "https://b.cos/k?q-ak=a&q-signature=0a&x-cos-security-token=t",
            "https://b.cos/k?q-ak=***&q-signature=***&x-cos-security-token=***",
            id="Tencent",
        ),
        pytest.param("<a href='https://h/?a=1&amp;sig=x'>", "<a href='https://h/?a=1&amp;sig=***'>", id="HTML"),
        pytest.param(
            "https://h/?to=https%3A%2F%2Fb%2Fk%3FX-Amz-Signature%3D0a%26z%3D1",
            "https://h/?to=https%3A%2F%2Fb%2Fk%3FX-Amz-Signature%3D***%26z%3D1",
            id="inside another address",
        ),
        pytest.param(
            "b'AWS4-HMAC-SHA256 Credential=AKIA1\\n/x, SignedHeaders=host, Signature=" + "0a" * 32 + "'",
            "b'AWS4-HMAC-SHA256 Credential=***, SignedHeaders=host, Signature=***'",
            id="the header of a request",
        ),
    ],
)
def test_addresses_are_shown_without_secrets(text, expected):
    """Users, passwords and signatures become ***; hosts, paths and the names of parameters stay, and once is enough."""
    assert shown(text) == expected
    assert shown(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/org/name@main",
        "hf://datasets/org/name@main:train,s3://bucket/a@b",
        "hf://name@main",
        "s3://bucket/a@b/c.jsonl",
        "file:///data/a@b",
        "org/name@v1.0",
        "https://host:8443/a@b",
        "http://[::1]:9000/a@b",
        "https://host/a?partNumber=1&uploadId=x",
        "No token=, and a key=value outside of an address: max_tokens=3, signature=f(x).",
        '{"a":"https://host","b":"x@y"}',
        "Write to somebody@example.com",
    ],
)
def test_what_is_no_secret_is_shown(text):
    """Revisions, ports, an @ in a path, and text that is no address stay as they are."""
    assert shown(text) == text


def test_a_text_of_many_addresses():
    """The time that it takes grows with its length only."""
    text = "@" + "://a:b" * 60_000
    assert shown(text) == text


BAD = [
    "https://user:pass@host/runs",
    SIGNED,
    "s3://user:pass@bucket/runs?sig=x1",
    "gs://bucket/a?token=abc&Signature=x1",
]
SECRETS = ("pass@", "0a1b2c", "IQoJ", "AKIA1", "x1", "=abc")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["TUNE_OUTPUT", "TUNE_DATASET", "TUNE_MODEL", "TUNE_CACHE", "TUNE_EVAL_DATASET"])
def test_a_rejected_address_is_shown_without_secrets(monkeypatch, name, value):
    """The problem names the variable and the address, without what would open it, however short that is."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        env.load()
    (problem,) = (problem for problem in caught.value.problems if problem.startswith(f"{name}="))
    assert "***" in problem
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.parametrize("value", BAD[:2])
def test_errors_show_addresses_without_secrets(value):
    """Also the store's own errors, and an error that quotes a library's."""
    with pytest.raises(ConfigError) as caught:
        open_store(value)
    quoted = [StorageError(f"Proxy {value} failed.", remedy=f"See {value}."), as_job_error(ValueError(value))]
    for error in (caught.value, *quoted):
        assert "***" in str(error)
        assert not [secret for secret in SECRETS if secret in f"{error} {error.args} {error.message} {error.remedy}"]


ENVIRONMENT = {
    "PATH": "/bin",
    "AWS_REGION": "r",
    "AWS_SECRET_ACCESS_KEY": "s",
    "AWS_ENDPOINT_URL_S3": "https://u:p@host",
    "HF_TOKEN": "t",
    "HF_TOKEN_PATH": "/token",
    "HF_TOKEN_WRITE": "w",
    "https_proxy": "u:p@proxy:3128",
    "NO_PROXY": "localhost",
    "MAX_TOKENS": "3",
    "EMPTY_TOKEN": "",
    "WANDB_API_KEY": "k",
    "DATABASE_URL": "postgres://u:p@host",
    "TUNE_DATASET": "https://host/a?sig=x",
}
PLAIN = {"PATH", "AWS_REGION", "HF_TOKEN_PATH", "NO_PROXY", "MAX_TOKENS", "EMPTY_TOKEN"}


@pytest.mark.parametrize(
    ("but", "more"),
    [
        ((), set()),
        (credentials.STORE, {"AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "https_proxy"}),
        (credentials.HUB, {"HF_TOKEN", "https_proxy"}),
    ],
    ids=["nobody", "store", "hub"],
)
def test_who_is_given_what(but, more):
    """What holds a credential, by its name or inside an address, is passed on only to whom it is allowed."""
    kept = credentials.without(ENVIRONMENT, but=but)
    assert kept == {name: ENVIRONMENT[name] for name in PLAIN | more}
