"""The last message of a run, where the platform looks for it: one line of JSON, shown by `kubectl describe pod`, or as
the failure reason of a SageMaker training job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog

from job.observability import logs
from job.observability.json_text import encoded
from job.runtime.errors import JobError

PLACE = Path("/dev/termination-log")
SAGEMAKER = Path("/opt/ml/output/failure")  # the platform makes the directory
LONGEST_BYTES = 4000  # Kubernetes cuts at 4096


def facts(error: JobError) -> dict[str, Any]:
    """How a run ended, as log and message show it."""
    return {"kind": error.kind, "exit_code": error.exit_code, "message": error.message, "remedy": error.remedy}


def write(error: JobError) -> None:
    """Write the message, where a platform reads one. A long one loses its end, never the remedy."""
    places = {PLACE: PLACE.exists, SAGEMAKER: SAGEMAKER.parent.is_dir}
    body = logs.redact(facts(error) | {"message": str(error)})
    while len(line := encoded(body)) > LONGEST_BYTES and body["message"]:
        body["message"] = body["message"][: len(body["message"]) * 3 // 4]
    for place, is_read in places.items():
        try:
            if is_read():
                place.write_bytes(line)
        except OSError as failed:
            structlog.get_logger().warning("termination_log_not_written", path=str(place), reason=failed.strerror)
