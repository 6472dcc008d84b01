"""What the process knows of its container."""

import pytest

from job.runtime import process


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", None), ("250000 100000", 2.5), ("50000 100000", 0.5), ("", None), (None, None)]
)
def test_cpu_quota(tmp_path, monkeypatch, text, cpus):
    """The container's CPU quota is read from cgroup v2."""
    monkeypatch.setattr(process, "CGROUP", tmp_path)
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert process.cpu_quota() == cpus


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param(
            {"NO_PROXY": ".svc,10.0.0.0/8", "AWS_ENDPOINT_URL_S3": "http://10.1.2.3:9000"}, ".svc,10.0.0.0/8,10.1.2.3"
        ),
        pytest.param({"NO_PROXY": "10.0.0.0/8", "HF_ENDPOINT": "http://10.1.2.3"}, "10.0.0.0/8,10.1.2.3", id="hub"),
        pytest.param(
            {"NO_PROXY": "169.254.0.0/16"}, "169.254.0.0/16,169.254.169.254,169.254.170.2,169.254.170.23", id="metadata"
        ),
        pytest.param({"NO_PROXY": "fd00::/8"}, "fd00::/8,fd00:ec2::254,fd00:ec2::23", id="IPv6"),
        pytest.param({"NO_PROXY": "192.168.0.0/16,a/b,::/x"}, "192.168.0.0/16,a/b,::/x", id="nothing inside"),
        pytest.param({"NO_PROXY": "10.0.0.0/8", "HF_ENDPOINT": "https://[broken"}, "10.0.0.0/8", id="no URL"),
        pytest.param({"NO_PROXY": "*"}, "*", id="all"),
    ],
)
def test_ranges_in_no_proxy(monkeypatch, variables, expected):
    """Address ranges are written out for the addresses that a run may ask; everything else stays."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    process.expand_no_proxy()
    assert process.variables()["NO_PROXY"] == expected
    process.expand_no_proxy()
    assert process.variables()["NO_PROXY"] == expected
