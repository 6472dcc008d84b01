"""Why no request can be sent to S3: rows of the table of causes for boto3's configuration, and for credentials by their
source and age."""

from __future__ import annotations

import urllib3.exceptions
from botocore import exceptions as aws

from job.runtime.errors import AccessDeniedError, ConfigError, StorageError
from job.storage.causes import Cause, Patience, any_of
from job.storage.s3.failures import ConfigurationError, CredentialsError, Failed, When, may_get_better


def _in_credentials(*kinds: type[BaseException]) -> When:
    return lambda it: it.first(CredentialsError) is not None and (not kinds or it.first(*kinds) is not None)


def _is_own_value(it: Failed) -> bool:
    """Whether a value of the configuration itself is wrong, rather than what a service answered."""
    return isinstance(it.error, CredentialsError) and isinstance(it.error.__cause__, ValueError)


CONFIGURATION: tuple[Cause, ...] = (
    Cause(
        when=any_of(aws.ProfileNotFound),
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.reason}",
        remedy="Correct AWS_PROFILE, or mount the file that has it.",
    ),
    Cause(
        when=any_of(aws.ConfigParseError, aws.ConfigNotFound),
        kind=ConfigError,
        patience=Patience.NONE,
        says="An AWS configuration file cannot be read: {it.reason}",
        remedy="Each line belongs into a section such as [default]. AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE "
        "name "
        "the files.",
    ),
    Cause(
        when=any_of(aws.InvalidRegionError, aws.NoRegionError, aws.UnknownRegionError),
        kind=ConfigError,
        patience=Patience.NONE,
        says="The AWS region is not valid: {it.reason}",
        remedy="Set AWS_DEFAULT_REGION to a name such as us-east-1, without quotes, spaces or a line break.",
    ),
    Cause(
        when=lambda it: it.says("Invalid endpoint: ", "was not a valid URI", "Invalid IPv6 URL"),
        kind=ConfigError,
        patience=Patience.NONE,
        says="The endpoint of S3 is not a URL: {it.reason}",
        remedy="Write AWS_ENDPOINT_URL_S3 as a URL with its scheme, and nothing behind: https://minio.example:9000.",
    ),
    Cause(
        when=any_of(ConfigurationError),
        kind=ConfigError,
        patience=Patience.NONE,
        says="boto3 does not accept its configuration: {it.reason}",
        remedy="Correct the AWS_* variable, or the line in the file that AWS_CONFIG_FILE names.",
    ),
    Cause(
        when=any_of(urllib3.exceptions.LocationParseError, aws.InvalidProxiesConfigError),
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what}: the proxy's address is not a URL: {it.reason}",
        remedy="Write HTTP_PROXY and HTTPS_PROXY as http://host:port, or unset them.",
    ),
    Cause(
        when=lambda it: it.says("Invalid header value", "Auth token value is not a legal header value"),
        kind=ConfigError,
        patience=Patience.NONE,
        says="{it.what} has a header that HTTP does not allow: a region or a token has a line break or a space",
        remedy="Remove the line break at the end of AWS_DEFAULT_REGION, AWS_SESSION_TOKEN or the token's file.",
    ),
)
CREDENTIALS: tuple[Cause, ...] = (
    Cause(
        when=_in_credentials(aws.PartialCredentialsError),
        kind=ConfigError,
        patience=Patience.BRIEF,
        renew=True,
        says="Half of the credentials is missing: {it.reason}",
        remedy="Set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or none of them.",
    ),
    Cause(
        when=lambda it: _in_credentials(aws.InvalidConfigError, aws.UnknownCredentialError)(it) or _is_own_value(it),
        kind=ConfigError,
        patience=Patience.NONE,
        says="The configuration of the credentials is not valid: {it.reason}",
        remedy="Correct the profile or the variables (AWS_ROLE_ARN, AWS_WEB_IDENTITY_TOKEN_FILE) that it names.",
    ),
    Cause(
        when=_in_credentials(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
        kind=ConfigError,
        patience=Patience.BRIEF,
        renew=True,
        says="The file {it.file} of {it.variable} cannot be read: {it.reason}",
        remedy="Mount it: for a role the platform mounts the token when the pod's service account has the role "
        "(eks.amazonaws.com/role-arn). For keys unset the variable.",
    ),
    Cause(
        when=any_of(aws.SSOError, aws.LoginError, aws.NoAuthTokenError, aws.TokenRetrievalError),
        kind=AccessDeniedError,
        patience=Patience.NONE,
        says="The login (SSO) of the AWS profile is missing or over: {it.reason}",
        remedy="Somebody at a browser must renew it (aws sso login). For a job use keys or a workload identity.",
    ),
    Cause(
        when=lambda it: _in_credentials(aws.ClientError)(it) and may_get_better(it),
        kind=StorageError,
        patience=Patience.LONG,
        renew=True,
        says="The service that gives credentials failed, asked for {it.seconds:.0f} s: {it.reason}",
        remedy="Start the run again when it answers.",
    ),
    Cause(
        when=_in_credentials(aws.ClientError),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        renew=True,
        says="The role does not give credentials, asked for {it.seconds:.0f} s: {it.reason}",
        remedy="Correct AWS_ROLE_ARN, and the role's trust policy: it must name this identity (provider, subject, "
        "audience). "
        "An expired token is replaced by the platform.",
    ),
    Cause(
        when=_in_credentials(aws.ConnectionError, aws.HTTPClientError),
        kind=StorageError,
        patience=Patience.BRIEF,
        renew=True,
        says="The service that gives credentials does not answer: {it.reason}",
        remedy="Start the run again when it does. Check egress rules, and that NO_PROXY has its address "
        "(169.254.169.254, "
        "169.254.170.2, 169.254.170.23).",
    ),
    Cause(
        when=lambda it: it.first(CredentialsError) is not None and it.error.__cause__ is None,
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        renew=True,
        says="{it.what}: there are no credentials, looked for {it.seconds:.0f} s. Credentials tried: {it.source}",
        remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, mount a credentials file, or give the pod a role.",
    ),
    Cause(
        when=_in_credentials(),
        kind=AccessDeniedError,
        patience=Patience.BRIEF,
        renew=True,
        says="The credentials cannot be used, tried for {it.seconds:.0f} s: {it.reason}. Credentials tried: "
        "{it.source}",
        remedy="Correct what gives them: the file, the program (credential_process), or the address in "
        "AWS_CONTAINER_*.",
    ),
)
