"""Between two attempts something changed: settings, contents, the day. What the run is must not."""

import datetime
import json
import shutil
import signal
import time

import psutil
import pytest
from safetensors.torch import load

from job.config.schema import FIXED, SETTINGS
from tests.faults.harness import CONFIG, FENCED, KILLED, commits, copied_run, killed_run

CHANGED = {
    "TUNE_MODEL": "{copy of the model}",
    "TUNE_DATASET": "s3://faults/other/rows.jsonl",
    "TUNE_EVAL_DATASET": "s3://faults/data/",
    "TUNE_EVAL_FRACTION": 0.2,
    "TUNE_FORMAT": "messages",
    "TUNE_COLUMNS": "system=persona",
    "TUNE_CHAT_TEMPLATE": "chatml",
    "TUNE_TRAIN_ON": "all",
    "TUNE_ROLE_WEIGHTS": "assistant=1,user=0.1",
    "TUNE_MAX_LENGTH": 64,
    "TUNE_OVERLONG": "drop",
    "TUNE_PRECISION": "16bit",
    "TUNE_LORA_R": 8,
    "TUNE_LORA_ALPHA": 32,
    "TUNE_LORA_DROPOUT": 0,
    "TUNE_LORA_TARGETS": "q_proj,v_proj",
    "TUNE_LORA_RSLORA": "true",
    "TUNE_EPOCHS": 1.5,
    "TUNE_MAX_STEPS": 14,
    "TUNE_CURRICULUM": "short_first",
    "TUNE_BATCH_SIZE": 8,
    "TUNE_LEARNING_RATE": 5e-3,
    "TUNE_WARMUP": 2,
    "TUNE_SCHEDULE": "cosine",
    "TUNE_WEIGHT_DECAY": 0.1,
    "TUNE_OPTIMIZER": "adamw_torch",
    "TUNE_MAX_GRAD_NORM": 0.5,
    "TUNE_SEED": 1,
}
DATED = (
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\n' }}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = "data/rows.jsonl"


def _curve(bench, run_id, field="loss"):
    """A value of each step, from the run's metrics."""
    lines = [json.loads(line) for line in bench.place.get(bench.key(run_id, "metrics.jsonl")).splitlines()]
    return {line["step"]: line[field] for line in lines if line["event"] == "train_progress"}


def _linear(rate, steps, *, warmup=1):
    """The learning rate that each step is taken with, by the definition of the linear schedule."""
    return {
        step: rate * (step / (warmup + 1) if step <= warmup else (steps - step + 1) / (steps - warmup))
        for step in range(1, steps + 1)
    }


def _refused(job, *named):
    """The attempt ends with 78, says why, and has trained nothing."""
    failed = job.ends(CONFIG).event("run_failed")
    text = " ".join([failed["message"], failed["remedy"], *failed.get("problems", [])])
    assert not [name for name in named if name not in text], text
    assert not job.events("train_progress") + job.events("evaluated") + job.events("run_complete")
    return failed


@pytest.fixture(scope="module")
def killed(bench):
    """A run that was killed at step 9, with commits of steps 2 to 8."""
    return killed_run(bench, "before")


@pytest.fixture
def run_id(bench, killed):
    """A copy of it."""
    return copied_run(bench, killed, "change")


@pytest.fixture(scope="module")
def finished(bench):
    """A run that ended well."""
    run_id = bench.name("finished")
    bench.start(run_id).ends(0)
    return run_id


@pytest.fixture
def own_data(bench):
    """A prefix with the usual rows, for one test alone."""
    prefix = f"{bench.name('data')}/"
    bench.place.put(f"{prefix}rows.jsonl", bench.place.get(ROWS))
    return prefix


@pytest.fixture
def own_model(tiny_model, tmp_path):
    """A copy of the model, for one test alone."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_the_table_of_changes_is_complete():
    """Every variable that decides the result has a row."""
    assert set(CHANGED) == {setting.variable for setting in SETTINGS if setting.fingerprint}


@pytest.mark.parametrize("variable", CHANGED)
def test_changed_variable(bench, killed, own_model, variable):
    """A changed variable that decides the result is refused by name before anything is read, and nothing trained."""
    bench.place.put("other/rows.jsonl", bench.place.get(ROWS))
    value = own_model if variable == "TUNE_MODEL" else CHANGED[variable]
    job = bench.start(killed, **{variable.removeprefix("TUNE_").lower(): value})
    failed = _refused(job)
    assert [problem.split()[0] for problem in failed["problems"]] == [variable]
    assert (f"TUNE_ALLOW_CHANGE={variable}" in failed["remedy"]) or variable in FIXED
    assert not job.events("dataset_ready")


@pytest.mark.parametrize("variable", FIXED)
def test_remedy_of_a_variable_that_cannot_be_allowed(bench, killed, variable):
    """What TUNE_ALLOW_CHANGE would refuse is not offered as the remedy."""
    failed = _refused(bench.start(killed, **{variable.removeprefix("TUNE_").lower(): CHANGED[variable]}))
    assert f"TUNE_ALLOW_CHANGE={variable}" not in failed["remedy"]


def test_refused_attempts_do_no_harm(bench, run_id):
    """However often a changed run was refused, with its own settings it continues and ends whole."""
    for _ in range(4):
        _refused(bench.start(run_id, seed=1), "TUNE_SEED")
    assert bench.start(run_id).ends(0).event("resumed")["resumed_step"] == 8
    bench.check_whole(run_id)


@pytest.mark.parametrize(
    ("name", "says"),
    [("model-0", "base_weights"), ("tokenizer_config.json", "tokenizer"), ("config.json", "model_config")],
)
def test_changed_model_on_disk(bench, own_model, name, says):
    """A model that changed on the disk, under its old name and with its old size, is refused, and says what changed;
    with the old file back, the run continues."""
    run_id = killed_run(bench, "model", model=own_model)
    path = next(path for path in sorted(own_model.iterdir()) if path.name.startswith(name))
    old = path.read_bytes()
    new = {
        "base_weights": old[:-2] + bytes([old[-2] ^ 1]) + old[-1:],
        "tokenizer": old.replace(b'"model_max_length": 512', b'"model_max_length": 511'),
        "model_config": old.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-01'),
    }[says]
    assert (len(new), new == old) == (len(old), False)
    path.write_bytes(new)
    _refused(bench.start(run_id, model=own_model), says)
    path.write_bytes(old)
    bench.start(run_id, model=own_model).ends(0)
    bench.check_whole(run_id)


@pytest.mark.parametrize("place", ["store", "disk"])
def test_overwritten_data(bench, own_data, tmp_path, place):
    """Data overwritten under its old name, even with the same size, is refused, and the message names the file."""
    path, old = tmp_path / "rows.jsonl", bench.place.get(ROWS)
    new = old.replace(b"It is 7.", b"It is 8.")

    def write(data):
        path.write_bytes(data)
        bench.place.put(f"{own_data}rows.jsonl", data)

    write(old)
    dataset = f"s3://faults/{own_data}" if place == "store" else path
    run_id = killed_run(bench, "data", dataset=dataset)
    write(new)
    _refused(bench.start(run_id, dataset=dataset), "rows.jsonl", "TUNE_RUN_ID", "TUNE_RESUME=fresh")
    write(old)
    bench.start(run_id, dataset=dataset).ends(0)
    bench.check_whole(run_id)


@pytest.mark.parametrize("left", [0, 1])
def test_removed_data(bench, own_data, left):
    """Data that was removed is refused as a change of this run's inputs, and the message names the file."""
    rows = bench.place.get(ROWS).splitlines(keepends=True)
    bench.place.put(f"{own_data}rows.jsonl", b"".join(rows[:20]))
    bench.place.put(f"{own_data}rows2.jsonl", b"".join(rows[20:]))
    dataset = f"s3://faults/{own_data}"
    run_id = killed_run(bench, "data", dataset=dataset)
    for name in ("rows2.jsonl", "rows.jsonl")[: 2 - left]:
        bench.place.delete(f"{own_data}{name}")
    job = bench.start(run_id, dataset=dataset)
    if left:
        _refused(job, "rows2.jsonl")
    else:
        assert job.wait() in (CONFIG, 65)
        assert own_data in job.event("run_failed")["message"]
        assert not job.events("train_progress")


def test_added_data(bench, own_data):
    """Data added to the prefix: the run in progress continues with what it began with; the finished run, started again,
    refuses and says how to train on the new data."""
    dataset = f"s3://faults/{own_data}"
    run_id = killed_run(bench, "added", dataset=dataset)
    bench.place.put(f"{own_data}more.jsonl", bench.place.get(ROWS).replace(b"It is", b"That is"))
    job = bench.start(run_id, dataset=dataset).ends(0)
    assert job.event("inputs_added_later")["first"] == [f"{dataset}more.jsonl"]
    bench.check_whole(run_id)
    done = bench.place.get(bench.key(run_id, "done.json"))
    _refused(bench.start(run_id, dataset=dataset), "more.jsonl", "TUNE_RUN_ID", "TUNE_RESUME=fresh")
    assert bench.place.get(bench.key(run_id, "done.json")) == done


def test_template_that_prints_the_date(bench, tmp_path):
    """A template that prints today's date prints that of the first attempt: the second one, on the next day (the hook
    sets the job's only clock of days), ends like a run that was done within the first, and not like one of the next."""
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)

    def run(date, step=None, what="dated", run_id=None):
        kill = [["commit_every_save"], ["kill_at_step", step]] if step else []
        run_id = run_id or bench.name(what)
        hooks = [["today", date], *kill]
        bench.start(run_id, chat_template=template, hooks=hooks).ends(KILLED if step else 0)
        return run_id

    same_day, next_day = run("2024-02-29"), run("2024-03-01")
    killed = run("2024-02-29", step=9)
    run("2024-03-01", run_id=killed)
    assert bench.place.json(bench.key(killed, "inputs.json"))["date"] == "2024-02-29"
    assert bench.result(killed) == bench.result(same_day) != bench.result(next_day)
    assert bench.place.json(bench.key(next_day, "inputs.json"))["date"] != str(
        datetime.datetime.now(datetime.UTC).date()
    )


def test_learning_rate_changed_on_purpose(bench, run_id):
    """An allowed new learning rate holds from the first step after the resume, on the same schedule."""
    job = bench.start(run_id, learning_rate=5e-3, allow_change="TUNE_LEARNING_RATE").ends(0)
    assert job.event("resumed_with_changes")["changed"] == ["TUNE_LEARNING_RATE"]
    old, new = _linear(1e-2, 12), _linear(5e-3, 12)
    expected = {step: old[step] if step <= 8 else new[step] for step in old}
    assert _curve(bench, run_id, "learning_rate") == pytest.approx(expected, rel=1e-9)
    bench.check_commits(run_id)
    assert bench.place.json(bench.key(run_id, "done.json"))["fingerprint"]["TUNE_LEARNING_RATE"] == 5e-3


def test_learning_rate_of_the_first_step_after_the_resume(bench, run_id):
    """An allowed new learning rate of next to nothing leaves the adapter where the checkpoint had it: no step is taken
    with the old one."""
    record = bench.place.json(commits(bench, run_id)[8])
    old = load(bench.place.get(f"out/{record['data']}/adapter_model.safetensors"))
    bench.start(run_id, learning_rate=1e-12, allow_change="TUNE_LEARNING_RATE").ends(0)
    new = load(bench.place.get(bench.key(run_id, "adapter/adapter_model.safetensors")))
    assert old.keys() == new.keys()
    assert max(float((old[name].float() - new[name].float()).abs().max()) for name in old) < 1e-9


def test_weight_decay_changed_on_purpose(bench, run_id):
    """An allowed new weight decay changes the steps after the resume, and none before."""
    bench.start(run_id, weight_decay=0.9, allow_change="TUNE_WEIGHT_DECAY").ends(0)
    usual, found = bench.baseline(), bench.result(run_id)
    assert found[0] != usual[0]
    assert [found[1][step] for step in range(1, 10)] == [usual[1][step] for step in range(1, 10)]


def test_more_steps_on_purpose(bench, run_id):
    """Allowed more steps: the run trains to the new end, on the new schedule from the resume on."""
    job = bench.start(run_id, max_steps=16, allow_change="TUNE_MAX_STEPS").ends(0)
    assert job.event("resumed_with_changes")["changed"] == ["TUNE_MAX_STEPS"]
    assert [line["step"] for line in job.events("train_progress")] == list(range(9, 17))
    old, new = _linear(1e-2, 12), _linear(1e-2, 16)
    expected = {step: old[step] if step <= 8 else new[step] for step in new}
    assert _curve(bench, run_id, "learning_rate") == pytest.approx(expected, rel=1e-9)
    assert bench.place.json(bench.key(run_id, "done.json"))["steps"] == 16


def test_fewer_steps_than_done_on_purpose(bench, run_id):
    """Fewer steps than the checkpoint has are refused, also where the change is allowed."""
    job = bench.start(run_id, max_steps=6, allow_change="TUNE_MAX_STEPS")
    job.ends(CONFIG)
    assert not job.events("train_progress")
    assert "8 steps" in job.event("run_failed")["message"]


def test_data_changed_on_purpose_before_the_first_commit(bench, own_data):
    """An attempt that died before it could commit had already said what the run reads: other data is refused then,
    too, and trained on where it is allowed."""
    dataset = f"s3://faults/{own_data}"
    run_id = bench.name("early")
    bench.start(run_id, hooks=[["kill_at_step", 1]], dataset=dataset).ends(KILLED)
    bench.place.put(f"{own_data}rows.jsonl", bench.place.get(ROWS).replace(b"It is", b"That is"))
    _refused(bench.start(run_id, dataset=dataset), "rows.jsonl")
    job = bench.start(run_id, dataset=dataset, allow_change="training_data").ends(0)
    assert not job.events("resumed")
    assert bench.result(run_id)[0] != bench.baseline()[0]


def test_data_changed_on_purpose(bench, own_data):
    """Allowed other data is trained on from the resume on; the finished run, started again just so, is complete."""
    dataset = f"s3://faults/{own_data}"
    run_id = killed_run(bench, "purpose", dataset=dataset)
    bench.place.put(f"{own_data}rows.jsonl", bench.place.get(ROWS).replace(b"It is", b"That is"))
    job = bench.start(run_id, dataset=dataset, allow_change="training_data").ends(0)
    assert job.event("resumed_with_changes")["changed"] == ["training_data"]
    usual, found = bench.baseline(), bench.result(run_id)
    assert [found[1][step] for step in range(1, 9)] == [usual[1][step] for step in range(1, 9)]
    assert found[0] != usual[0]
    bench.start(run_id, dataset=dataset, allow_change="training_data").ends(0).event("already_complete")


def test_variable_changed_in_a_finished_run_on_purpose(bench, finished):
    """More steps for a run that is finished are refused: it does not end with 0 as if it had done them."""
    job = bench.start(copied_run(bench, finished), max_steps=16, allow_change="TUNE_MAX_STEPS")
    failed = job.ends(CONFIG).event("run_failed")
    assert "TUNE_MAX_STEPS was 12, is 16" in failed["problems"]
    assert "TUNE_ALLOW_CHANGE" not in failed["remedy"]


def test_change_does_not_outlive_its_permission(bench, run_id):
    """A run that continued with an allowed change and was killed again continues with the new value and, without the
    permission, refuses the old one."""
    hooks = [["commit_every_save"], ["kill_at_step", 11]]
    allowed = {"learning_rate": 5e-3, "allow_change": "TUNE_LEARNING_RATE"}
    bench.start(run_id, hooks=hooks, **allowed).ends(KILLED)
    _refused(bench.start(run_id), "TUNE_LEARNING_RATE")
    job = bench.start(run_id, **allowed).ends(0)
    assert job.event("resumed")["resumed_step"] == 10
    assert not job.events("resumed_with_changes")
    old, new = _linear(1e-2, 12), _linear(5e-3, 12)
    expected = {step: old[step] if step <= 8 else new[step] for step in old}
    assert _curve(bench, run_id, "learning_rate") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["TUNE_NONSENSE", "TUNE_OUTPUT", *FIXED])
def test_names_that_cannot_be_allowed(bench, killed, name):
    """TUNE_ALLOW_CHANGE with a name that is no part of the fingerprint, or that no checkpoint fits, is refused before
    anything is touched."""
    before = bench.place.names(bench.key(killed, ""))
    job = bench.start(killed, allow_change=name)
    _refused(job, name)
    assert not job.events("run_started")
    assert bench.place.names(bench.key(killed, "")) == before


@pytest.mark.parametrize("attempted", [False, True])
def test_require_without_a_checkpoint(bench, attempted):
    """TUNE_RESUME=require refuses to begin again, whether nobody or somebody without a checkpoint was there before."""
    run_id = killed_run(bench, "require", step=1) if attempted else bench.name("require")
    _refused(bench.start(run_id, resume="require"), "TUNE_RESUME=require", "TUNE_OUTPUT")
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)


def test_require_with_a_checkpoint(bench, run_id):
    """TUNE_RESUME=require continues where there is a checkpoint."""
    assert bench.start(run_id, resume="require").ends(0).event("resumed")["resumed_step"] == 8
    bench.check_whole(run_id)


def test_fresh_on_a_finished_run(bench, finished):
    """TUNE_RESUME=fresh makes the run once more from the start. What was published stays, byte for byte, and
    `done.json` and `latest.json` name it until the new result is there."""
    run_id = copied_run(bench, finished, "fresh")
    bench.start(run_id).ends(0).event("already_complete")
    prefix = bench.key(run_id, "")
    old = {key: bench.place.get(key) for key in bench.place.names(prefix)}
    latest = bench.place.get("out/latest.json")
    bench.start(run_id, resume="fresh", hooks=[["kill_at_step", 7]]).ends(KILLED)
    now = {key: bench.place.get(key) for key in old}
    assert now == old
    assert bench.place.get("out/latest.json") == latest
    job = bench.start(run_id).ends(0)
    assert [line["step"] for line in job.events("train_progress")][-1] == 12
    assert all(bench.place.get(key) == old[key] for key in old if f"{prefix}results/" in key)
    done = bench.place.json(f"{prefix}done.json")
    assert done["prefix"] != json.loads(old[f"{prefix}done.json"])["prefix"]
    assert bench.place.json("out/latest.json")["prefix"] == done["prefix"]
    bench.check_whole(run_id)


def test_fresh_life_is_the_one_that_is_resumed(bench, run_id):
    """After TUNE_RESUME=fresh no checkpoint of the old life is used, even where the new one has none yet."""
    bench.start(run_id, resume="fresh", hooks=[["kill_at_step", 1]]).ends(KILLED)
    job = bench.start(run_id).ends(0)
    assert not job.events("checkpoint_restored")
    assert job.events("train_progress")[0]["step"] == 1
    bench.check_whole(run_id)


def test_zombie_of_the_life_before(bench):
    """An attempt that slept through TUNE_RESUME=fresh wakes up, is fenced, and changes nothing of the new life."""
    run_id = bench.name("zombie")
    zombie = bench.start(run_id, hooks=[["commit_every_save"], ["stop_at_step", 9]])
    zombie.until("train_progress", step=8)
    while psutil.Process(zombie.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    bench.start(run_id, resume="fresh").ends(0)
    before = {key: bench.place.get(key) for key in bench.place.names(bench.key(run_id, "")) if "/attempts/" not in key}
    zombie.send(signal.SIGCONT)
    zombie.ends(FENCED)
    after = {key: bench.place.get(key) for key in bench.place.names(bench.key(run_id, "")) if "/attempts/" not in key}
    assert {key: data for key, data in after.items() if "/checkpoints/data/0001/" not in key} == {
        key: data for key, data in before.items() if "/checkpoints/data/0001/" not in key
    }
    bench.check_whole(run_id)


@pytest.mark.parametrize("resume", ["auto", "require"])
def test_already_complete(bench, finished, resume):
    """A finished run that is started again says so, ends with 0, and writes and trains nothing."""
    stored = {key: bench.place.get(key) for key in bench.place.names(bench.key(finished, ""))}
    job = bench.start(finished, resume=resume).ends(0)
    job.event("already_complete")
    assert not job.events("train_progress") + job.events("run_started")
    assert {key: bench.place.get(key) for key in bench.place.names(bench.key(finished, ""))} == stored


def test_already_complete_with_another_setting(bench, finished):
    """A finished run that is started again with another learning rate is refused, and left as it is."""
    failed = _refused(bench.start(finished, learning_rate=5e-3))
    assert [problem.split()[0] for problem in failed["problems"]] == ["TUNE_LEARNING_RATE"]
    bench.check_whole(finished)


def test_micro_batch_auto_takes_the_recorded_one(bench, run_id):
    """TUNE_MICRO_BATCH=auto continues with the cut of the checkpoint's attempt, for the same bits."""
    job = bench.start(run_id, micro_batch=None).ends(0)
    assert job.event("plan_made")["plan"]["micro_batch"] == 2
    assert not job.events("resume_not_bitwise")
    bench.check_whole(run_id)


def test_another_micro_batch(bench, run_id):
    """Another TUNE_MICRO_BATCH is no other run: it continues, and says that the bits may differ."""
    job = bench.start(run_id, micro_batch=4).ends(0)
    assert job.event("resume_not_bitwise")["plan"]["is"]["micro_batch"] == 4
    assert job.event("resumed")["resumed_step"] == 8
    found, usual = bench.result(run_id)[1], bench.baseline()[1]
    assert found == pytest.approx(usual, rel=0.2)
    assert list(commits(bench, run_id)) == [2, 4, 6, 8, 10, 12]


def test_deterministic(bench, run_id):
    """TUNE_DETERMINISTIC is recorded, is no other run, and refuses by name an operation that may not repeat itself."""
    job = bench.start(run_id, deterministic=True, hooks=[["unrepeatable_kernel", 9]]).ends(CONFIG)
    assert job.event("plan_made")["plan"]["deterministic"] is True
    assert job.event("resume_not_bitwise")["plan"]["was"]["deterministic"] is False
    failed = job.event("run_failed")
    assert "put_ does not have" in failed["message"]
    assert "TUNE_DETERMINISTIC=false" in failed["remedy"]
    bench.start(run_id, deterministic=True).ends(0)
    bench.check_whole(run_id)


def test_more_steps_after_the_right_to_publish(bench):
    """A run that was lost after its final record, and continues with more steps on purpose, publishes what it trained,
    not what the lost attempt would have."""
    run_id = bench.name("more")
    bench.start(run_id, hooks=[["call_before", "job.state.publication:Publication.publish", 1, "SIGKILL"]]).ends(KILLED)
    changes = {"max_steps": 16, "allow_change": "TUNE_MAX_STEPS"}
    bench.start(run_id, **changes).ends(0)
    done = bench.place.json(bench.key(run_id, "done.json"))
    assert (done["steps"], done["fingerprint"]["TUNE_MAX_STEPS"]) == (16, 16)
    assert bench.result(run_id)[1].keys() == set(range(1, 17))
    bench.start(run_id, **changes).ends(0).event("already_complete")


def test_fresh_keeps_the_checkpoints_of_the_old_life(bench, run_id):
    """Starting over loses nothing: the old life's checkpoint files stay, however long the new one runs."""
    before = bench.place.names(bench.key(run_id, "checkpoints/data/0001/"))
    assert before
    bench.start(run_id, resume="fresh").ends(0)
    assert bench.place.names(bench.key(run_id, "checkpoints/data/0001/")) == before
    bench.check_whole(run_id)
