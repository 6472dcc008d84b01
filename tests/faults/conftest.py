"""A zygote and a bucket for the fault matrix."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest

from tests import jobs
from tests.faults.harness import SETTINGS, Bench, Place
from tests.servers import ACCESS_KEY, SECRET_KEY
from tests.zygote import Zygote


@pytest.fixture(scope="session", autouse=True)
def credentials() -> Iterator[None]:
    """Credentials of the local servers, and no other way to any cloud."""
    values = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TUNE_") or name.upper().endswith("_PROXY")]:
            patch.delenv(name)
        for name, value in values.items():
            patch.setenv(name, value)
        boto3.setup_default_session()
        yield
    boto3.setup_default_session()


@pytest.fixture(scope="session")
def zygote(credentials: None) -> Zygote:
    """The process that forks jobs."""
    return jobs.zygote()


def make_bench(zygote: Zygote, endpoint: str, directory: Path, tiny_model: Path, rows: Path, name: str) -> Bench:
    """A bucket with the data in it; the model stays on the disk."""
    place = Place(bucket=name, endpoint=endpoint)
    place.client.create_bucket(Bucket=name)
    place.put("data/rows.jsonl", rows.read_bytes())
    common = {
        **SETTINGS,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "model": tiny_model,
        "dataset": f"s3://{name}/data/",
        "output": f"s3://{name}/out",
    }
    return Bench(zygote=zygote, place=place, directory=directory, common=common, baselines={})


@pytest.fixture(scope="session")
def bench(zygote, moto, tmp_path_factory, tiny_model, rows) -> Bench:
    """Jobs against a store that honours conditional writes."""
    return make_bench(zygote, moto, tmp_path_factory.mktemp("bench"), tiny_model, rows, "faults")


@pytest.fixture(scope="session")
def plain_bench(zygote, rclone, tmp_path_factory, tiny_model, rows) -> Bench:
    """Jobs against a store that ignores conditional writes, whose objects are files that a test can damage."""
    return make_bench(zygote, rclone.endpoint, tmp_path_factory.mktemp("plain"), tiny_model, rows, "faults")


@pytest.fixture(autouse=True)
def nothing_left(zygote, tmp_path_factory) -> Iterator[None]:
    """No job leaves a process behind: not when it ends, not when it is killed."""
    yield
    base = str(tmp_path_factory.getbasetemp())
    deadline = time.monotonic() + 8
    while left := [child for child in psutil.process_iter() if _is_jobs(child, base, zygote)]:
        if time.monotonic() > deadline:
            lines = [child.cmdline() for child in left]
            for child in left:
                child.kill()
            raise AssertionError(f"left running: {lines}")
        time.sleep(0.05)


def _is_jobs(child: psutil.Process, base: str, zygote: Zygote) -> bool:
    with contextlib.suppress(psutil.Error):
        mine = child.environ().get("TMPDIR", "").startswith(f"{base}/") and "scratch-" in child.environ()["TMPDIR"]
        forked = child.ppid() == zygote.pid and child.status() != psutil.STATUS_ZOMBIE
        return (mine or forked) and child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    return False


# How many cases of a row `make test` runs; the others are marked `full`, and `make faults` runs them all.
SAMPLED = {
    "test_kill_at_a_random_step": 1,
    "test_kill_inside_a_save": 1,
    "test_kill_after_the_last_commit": 1,
    "test_kill_after_the_published_record": 1,
    "test_kill_with_weights": 0,
    "test_weights_that_are_a_mask": 0,
    "test_a_zombie_in_training": 1,
    "test_a_zombie_that_publishes": 0,
    "test_an_upload_that_arrives_late": 1,
    "test_the_last_word_of_a_replaced_attempt": 1,
    "test_a_store_that_loses_what_it_confirmed": 1,
    "test_a_store_that_always_loses": 0,
    "test_a_false_denial": 0,
    "test_a_record_that_is_not_readable": 0,
    "test_records_of_attempts_that_were_deleted": 0,
    "test_sweeping_is_refused": 0,
    "test_retention_after_a_crash": 0,
    "test_changed_model_on_disk": 1,
    "test_rot_on_the_disk_of_the_store": 0,
    "test_lost_while_the_disk_is_full": 0,
    "test_orphans_of_multipart_uploads": 0,
    "test_retention_races_a_reader": 0,
    "test_three_preemptions_at_the_same_step": 0,
    "test_a_signal_with_a_slow_link": 0,
    "test_overwritten_data": 1,
    "test_zombie_of_the_life_before": 0,
    "test_change_does_not_outlive_its_permission": 0,
    "test_more_steps_after_the_right_to_publish": 0,
    "test_a_signal_in_training": 1,
    "test_a_conflict_on_the_commit": 0,
    "test_a_late_attempt_leaves_the_report_alone": 0,
    "test_data_changed_on_purpose_before_the_first_commit": 0,
    "test_errors_at_different_steps_are_not_permanent": 0,
    "test_require_without_a_checkpoint": 1,
    "test_removed_data": 1,
    "test_a_killed_run_keeps_the_order": 0,
    "test_damaged_file": 1,
    "test_damaged_record": 1,
    "test_record_with_a_path_that_escapes": 1,
    "test_record_with_a_prefix_that_escapes": 1,
    "test_latest_does_not_influence_a_resume": 1,
    "test_latest_is_repaired": 1,
    "test_parts_of_different_steps": 1,
    "test_changed_variable": 1,
    "test_names_that_cannot_be_allowed": 1,
    "test_remedy_of_a_variable_that_cannot_be_allowed": 1,
    "test_the_machine_is_lost_in_an_upload": 1,
    "test_the_reply_of_a_write_is_lost": 0,
    "test_a_signal_in_each_phase": 1,
    "test_down_at_the_start": 0,
    "test_down_in_mid_run": 1,
    "test_down_past_the_patience": 0,
    "test_down_at_the_end": 0,
    "test_throttled": 0,
    "test_denied_from_the_start": 0,
    "test_a_hanging_server": 0,
    "test_every_first_reply_is_lost": 0,
    "test_a_bad_line": 0,
    "test_data_changed_on_purpose": 0,
    "test_fresh_life_is_the_one_that_is_resumed": 0,
    "test_kill_of_the_uploader_alone": 0,
    "test_everything_damaged": 0,
    "test_a_commit_that_would_not_fit_is_not_begun": 0,
    "test_the_third_failure_says_that_it_is_permanent": 0,
    "test_the_replaced_attempt_writes_late": 0,
    "test_another_micro_batch": 0,
    "test_deterministic": 0,
    "test_fresh_keeps_the_checkpoints_of_the_old_life": 0,
    "test_learning_rate_changed_on_purpose": 0,
    "test_learning_rate_of_the_first_step_after_the_resume": 0,
    "test_micro_batch_auto_takes_the_recorded_one": 0,
    "test_weight_decay_changed_on_purpose": 0,
    "test_require_with_a_checkpoint": 0,
    "test_template_that_prints_the_date": 0,
    "test_kills_without_a_reason_never_count": 0,
    "test_the_same_step_failing_three_times": 0,
    "test_an_unfinished_run_of_an_earlier_version": 0,
    "test_pid_1": 0,
    "test_a_token_expires": 0,
    "test_deletes_are_denied": 0,
    "test_the_disk_is_full_for_a_while": 0,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only the full matrix runs: of each sampled row all cases but some that lie on a diagonal."""
    for name, count in SAMPLED.items():
        cases = [item for item in items if getattr(item, "originalname", None) == name]
        stride = -(-len(cases) // count) if count else 0
        for index, item in enumerate(cases):
            if not count or index % stride != (index // stride) % stride:
                item.add_marker(pytest.mark.full)
