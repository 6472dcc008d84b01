"""Credentials: which variables of an environment hold one, which parts of an address are one, and who is given them.

What counts is named here, not guessed from a word inside a name. Errors and log lines show addresses through `shown`;
values of this environment's own vanish in `job.observability.redaction`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from urllib.parse import unquote

REPLACEMENT = "***"
CREDENTIALS = frozenset(
    (
        "AWS_BEARER_TOKEN_BEDROCK",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_KEY",
        "DOCKER_AUTH_CONFIG",
        "KAGGLE_KEY",
        "MYSQL_PWD",
        "PGPASSWORD",
        "SSHPASS",
    )
)
"""Variables that hold a credential although their names do not end like one."""
ENDINGS = (
    *("TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "SIGNATURE"),
    *("KEY", "APIKEY", "PAT", "JWT"),
)
"""Last words of the names of variables that hold a credential (AWS_SECRET_ACCESS_KEY, HF_TOKEN, WANDB_API_KEY); behind
them may stand which of several it is (HF_TOKEN_WRITE, DB_PASSWORD_2, TOKEN1), or how it is written (SSH_KEY_BASE64)."""
HARMLESS = frozenset(
    (
        *("BOS_TOKEN", "EOS_TOKEN", "PAD_TOKEN", "UNK_TOKEN"),
        *("CACHE_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "PARTITION_KEY", "PRIMARY_KEY", "PUBLIC_KEY", "SORT_KEY"),
    )
)
"""Names that end like a credential's: tokens of a vocabulary, the path of a file, keys that open nothing."""
SIGNING = (
    *("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "AWSAccessKeyId"),
    *("X-Goog-Signature", "X-Goog-Credential", "GoogleAccessId"),
    *("X-Oss-Signature", "X-Oss-Credential", "X-Oss-Security-Token", "OSSAccessKeyId"),
    *("X-Tos-Signature", "X-Tos-Credential", "X-Tos-Security-Token"),
    *("q-signature", "q-ak", "X-Cos-Security-Token"),
)
"""Parameters of presigned addresses, recognised wherever they stand."""
PARAMETERS = (
    *("signature", "sig", "token", "access_token", "auth_token", "id_token", "refresh_token", "security-token"),
    *("private_token", "hf_token", "session_token", "SecurityToken", "auth", "authorization", "jwt"),
    *("key", "api_key", "api-key", "apikey", "access_key", "secret_key", "AccountKey", "SharedAccessKey"),
    *("password", "passwd", "pwd", "secret", "client_secret"),
)
"""Further parameters that hold a credential, behind the `?`, `&`, `;` or `#` of an address."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
STORE = ("AWS_*", *PROXIES)
"""Credentials that S3 needs, and the way there; patterns of names in capitals."""
HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", *PROXIES)
"""Credentials that the hub needs, and the way there."""

_CREDENTIAL = re.compile(rf"(?:.*_)?(?:{'|'.join(ENDINGS)})(?:_?\d+|_(?:READ|WRITE|VALUE|JSON|B64|BASE64))?")
# Up to the last @ before the path; a password may also have characters that an address should quote, then its length is
# bounded: a text of many addresses would take forever. A revision on the
# hub (hf://name@main) is no user, nor is a port (host:8443/a@b).
_USER = re.compile(
    r'(?:(?<=://)|(?<=:\\/\\/))(?:(?<!\bhf://)[^/?#\s"]+|[^/?#\s:@\[\]"]+:(?!//|\d+(?:[/?#]|\Z))[^\s@"]{0,256})(?=@)'
)
_SEPARATOR = r"(?:[?&;#]|%3F|%26|\\u0026)"
_PARAMETER = re.compile(
    rf"(?:(?:(?<![\w-])|{_SEPARATOR})(?:{'|'.join(SIGNING)})|{_SEPARATOR}(?:{'|'.join(PARAMETERS)}))(?:=|%3D)"
    r"(?P<value>(?:(?!%26|\\u0026)[^\s&#\"'<>,])+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(?<=AWS4-HMAC-SHA256 Credential=)[^,]+|(?<=\bSignature=)[0-9a-f]{64}\b")
"""Who signed a request to S3, and the signature."""


def is_credential(name: str) -> bool:
    """Whether a variable of this name holds a credential."""
    name = name.upper()
    return name in CREDENTIALS or (name not in HARMLESS and _CREDENTIAL.fullmatch(name) is not None)


def held(name: str, value: str) -> Iterator[str]:
    """The credentials that a variable holds: its value, or user and password, the password alone and signatures of
    each address in it; as written and decoded. None of them is empty."""
    if is_credential(name) and value.strip():
        yield value.strip()
    if name.upper() in PROXIES and "://" not in value:
        value = f"http://{value}"  # libraries take a proxy without a scheme, too
    for found in _USER.finditer(value):
        for part in (found[0], found[0].partition(":")[2]):
            yield from filter(None, (part, unquote(part)))
    for found in _PARAMETER.finditer(value):
        yield from (found["value"], unquote(found["value"]))


def without(environment: Mapping[str, str], *, but: Sequence[str] = ()) -> dict[str, str]:
    """The variables of an environment that hold no credential, and those that `but` allows (see `STORE`)."""

    def allowed(name: str) -> bool:
        return any(fnmatchcase(name.upper(), pattern) for pattern in but)

    return {name: value for name, value in environment.items() if allowed(name) or not any(held(name, value))}


def shown(text: str) -> str:
    """The text with `***` for users, passwords and signatures in the addresses that it names; the rest stays.

    `https://user:pass@host/a?sig=abc&b=1` becomes `https://***@host/a?sig=***&b=1`.
    """
    if "@" in text:
        text = _USER.sub(REPLACEMENT, text)
    if "=" in text or "%3" in text:
        text = _PARAMETER.sub(lambda found: found[0][: -len(found["value"])] + REPLACEMENT, text)
        if "Signature=" in text or "Credential=" in text:
            text = _HEADER.sub(REPLACEMENT, text)
    return text
