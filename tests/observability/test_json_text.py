"""All JSON that is written can be read by a reader that knows JSON only."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.observability import termination
from job.observability.json_text import dumps, encoded
from job.runtime.errors import DataError
from job.state.json_object import encode
from job.state.ledger import Ledger
from job.state.record import Record
from job.storage.open import open_store

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("half \udc80"),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def strict(text):
    """As JSON's own grammar has it."""

    def no(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=no)


@settings(max_examples=40)
@given(VALUES)
def test_any_value_is_strict_json(value):
    """Whatever the numbers and texts: UTF-8 that a strict reader takes, with the finite values as they were."""
    text = encoded(value).decode()
    assert encoded(strict(text)) == encoded(strict(dumps(strict(text))))
    assert strict(encode({"value": value})) == {"layout": 2, "value": strict(text)}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.inf, '"Infinity"'),
        (-math.inf, '"-Infinity"'),
        (math.nan, '"NaN"'),
        ({"a": [1.5, (math.nan,)]}, '{"a": [1.5, ["NaN"]]}'),
        (0.1, "0.1"),
        (1e300, "1e+300"),
        ({"é": None}, '{"é": null}'),
    ],
)
def test_numbers_that_json_does_not_have(value, text):
    """They become texts, at any depth; all others stay."""
    assert dumps(value) == text


def test_a_step_that_overflowed(tmp_path):
    """In fp16 the gradient of a skipped step is infinite: its line in the metrics is JSON, also after a resume."""
    record = Record(ledger=Ledger(store=open_store(str(tmp_path)), run_id="r"))
    record.note({"event": "train_progress", "step": 1, "loss": 2.5, "grad_norm": math.inf})
    record.note({"event": "train_progress", "step": 2, "loss": 2.4, "grad_norm": math.nan})
    resumed = Record(ledger=record.ledger)
    resumed.resume(record.history_text())
    for found in (record, resumed):
        lines = [strict(line) for line in found.history_text().splitlines()]
        assert [line["grad_norm"] for line in lines] == ["Infinity", "NaN"]


def test_the_termination_message(tmp_path, monkeypatch):
    """Half a surrogate pair, as a file name may have, does not keep it from being written."""
    monkeypatch.setattr(termination, "PLACE", tmp_path / "message")
    (tmp_path / "message").touch()
    termination.write(DataError("bad file \udc80", remedy="rename it"))
    assert strict((tmp_path / "message").read_text())["exit_code"] == 65
