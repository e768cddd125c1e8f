"""Where the data stands: positions are copied when they are taken, and come back as they were."""

import datetime
import enum
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.plan import batch_of, by_a_plain_loop, digest, fresh, step
from hypothesis import given
from hypothesis import strategies as st

import stepc as sc
from stepc._runner.data import DataItem, Source, decode_position, encode_position


class Live:
    """Batches without end, with a position that is one dict, changed in place, inside and outside of the iterator."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"given": {"number": 0}}

    def __iter__(self) -> "Live":
        return self

    def __next__(self) -> Any:
        self.state["given"]["number"] += 1
        return batch_of(int(self.state["given"]["number"]))

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize("check_data", [False, True])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_run_resumes_where_it_was_though_the_position_is_a_live_object(
    prefetch: int, check_data: bool, tmp_path: Path
) -> None:
    keep = sc.Checkpoints(tmp_path, every=2, check_data=check_data)
    for steps in (3, 8):
        run = sc.run(step(), fresh(), sc.Data(Live(), prefetch=prefetch), steps=steps, checkpoint=keep)
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 9))))


def test_iterator_that_keeps_the_position_it_is_given_does_not_change_ours() -> None:
    source = Source(Live())
    source.read()
    after = source.position()
    source.go_to(after)
    again = source.read()
    assert isinstance(again, DataItem) and again.before == {"given": {"number": 1}}
    assert after == {"given": {"number": 1}}


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same classes throughout."""
    match a:
        case dict():
            return type(b) is dict and len(a) == len(b) and all(map(same, a.items(), b.items()))
        case list() | tuple():
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        case np.ndarray():
            return type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        case _:
            return type(a) is type(b) and (a == b or a != a and b != b)


def there_and_back(position: Any) -> Any:
    return decode_position(encode_position(position, step=1), is_same=True)


@pytest.mark.parametrize(
    "position",
    [
        None, True, 2**80, -0.0, float("inf"), float("nan"), "text", b"\x00\xff", (), [], {}, ((1,), [2, (3,)]),
        {1: "one", "1": 1, None: 0, (0, 1): b"", 2.5: ()}, {"$tuple": [1]}, {"$dict": {"$bytes": "AA=="}},
        np.int64(5), np.float32(0.1), np.float64(1.5), np.bool_(True), np.uint8(255), np.str_("x"),
        np.datetime64("2026-01-02"), np.arange(6, dtype=">i4").reshape(2, 3).T, np.zeros((0, 3), np.float16),
        np.random.default_rng(3).bit_generator.state, {"each": [1], "json": 2, "bytes": "x"},
    ],
    ids=repr,
)  # fmt: skip
def test_position_comes_back_as_it_was(position: Any) -> None:
    assert same(position, there_and_back(position))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
PARTS = st.recursive(
    PLAIN | st.integers(-(2**63), 2**63 - 1).map(np.int64) | st.floats().map(np.float64),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(PLAIN, inner),
    max_leaves=8,
)


@given(PARTS)
def test_any_position_comes_back_as_it_was(position: Any) -> None:
    assert same(position, there_and_back(position))


def test_plain_position_is_written_as_it_is() -> None:
    position = {"epoch": 2, "shards": [{"file": "a", "offset": 12}], "rate": 0.5}
    assert encode_position(position, step=1) == {"json": position}


class Color(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("position", "fact"),
    [
        ({"given": [0, {1}]}, "position['given'][1]  got set: {1}"),
        ({"at": OrderedDict(a=1)}, "position['at']  got OrderedDict: OrderedDict("),
        ((Color.RED,), "position[0]  got Color: <Color.RED: 1>"),
        (datetime.date(2026, 1, 2), "position  got date: datetime.date(2026, 1, 2)"),
        (np.array([object()]), "position  got ndarray: "),
        ({(Color.RED,): 1}, "position, key (<Color.RED: 1>,)[0]  got Color: <Color.RED: 1>"),
    ],
    ids=["set", "ordered", "enum", "date", "objects", "enum-as-key"],
)
def test_position_that_would_come_back_as_another_is_refused(position: Any, fact: str) -> None:
    with pytest.raises(sc.CheckpointError) as raised:
        encode_position(position, step=4)
    text = str(raised.value)
    assert text.startswith("`get_state()` of the data must return JSON values, bytes, tuples or numpy arrays.\n")
    assert fact in text


class Typed(Live):
    """A position of numpy integers, tuples and integer keys: it must come back as such."""

    def __init__(self) -> None:
        self.state = {"given": {"number": np.int64(0), "shards": {0: (1, 2)}}}

    def set_state(self, state: dict[str, Any]) -> None:
        assert type(state["given"]["number"]) is np.int64
        assert state["given"]["shards"] == {0: (1, 2)}
        self.state = state


@pytest.mark.parametrize("make", [Live, Typed])
def test_typed_position_resumes(make: Callable[[], Any], tmp_path: Path) -> None:
    for steps in (3, 6):
        run = sc.run(step(), fresh(), make(), steps=steps, checkpoint=sc.Checkpoints(tmp_path, every=3))
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 7))))
