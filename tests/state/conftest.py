"""What the tests over a store in memory share."""

import pytest
import structlog

from job.state import json_object
from tests.state import walk


@pytest.fixture
def quiet_walk(monkeypatch):
    """No pauses and no log lines."""
    config = structlog.get_config()
    monkeypatch.setattr(json_object, "PAUSE_SECONDS", 0.0)
    walk.quiet()
    yield
    structlog.configure(**config)
