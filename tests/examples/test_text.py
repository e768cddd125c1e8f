"""The text: what is read, how it is split and cut, and the model of two bytes that judges it."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import stepc as sc
from examples.gpt import text


def as_bytes(content: bytes) -> text.Bytes:
    return np.frombuffer(content, np.uint8)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Two hundred files of one line, each with a number of its own."""
    for number in range(200):
        path = tmp_path / f"package{number % 3}" / f"file{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<{number}>\n")
    return tmp_path


def lines(part: text.Bytes) -> set[bytes]:
    return set(part.tobytes().splitlines())


def test_read_every_file_is_in_one_part(library: Path) -> None:
    found = text.read(library, max_bytes=10**6)
    assert lines(found.train) | lines(found.held_out) == {f"<{number}>".encode() for number in range(200)}
    assert not lines(found.train) & lines(found.held_out)
    assert 5 < len(lines(found.held_out)) < 50


def test_read_new_file_moves_no_other(library: Path) -> None:
    before = text.read(library, max_bytes=10**6)
    (library / "new.py").write_text("<new>\n")
    after = text.read(library, max_bytes=10**6)
    assert lines(before.train) <= lines(after.train)
    assert lines(before.held_out) <= lines(after.held_out)


def test_read_twice_is_the_same(library: Path) -> None:
    one, other = (text.read(library, max_bytes=500) for _ in range(2))
    assert one.train.tobytes() == other.train.tobytes()
    assert one.held_out.tobytes() == other.held_out.tobytes()


def test_read_stops_at_cap(library: Path) -> None:
    found = text.read(library, max_bytes=501)
    assert len(found.train) + len(found.held_out) == 501


@pytest.mark.parametrize("name", ["test/a.py", "deep/tests/a.py", "site-packages/a.py", "notes.txt"])
def test_read_skips_what_is_not_the_library(library: Path, name: str) -> None:
    (library / name).parent.mkdir(parents=True, exist_ok=True)
    (library / name).write_text("<skipped>\n")
    found = text.read(library, max_bytes=10**6)
    assert b"<skipped>" not in lines(found.train) | lines(found.held_out)


def test_read_empty_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(sc.ConfigError, match="0 Python files"):
        text.read(tmp_path, max_bytes=100)


def test_read_running_library_has_both_parts() -> None:
    found = text.read(text.standard_library(), max_bytes=300_000)
    assert len(found.train) > len(found.held_out) > 1000


def test_batches_are_windows_of_the_text() -> None:
    source = bytes(range(100))
    batch = next(text.Batches(as_bytes(source), rows=50, context=7, seed=0))
    assert batch["tokens"].shape == (50, 8)
    assert batch["tokens"].dtype == np.int32
    assert all(bytes(row.tolist()) in source for row in batch["tokens"])


def test_batches_reach_both_ends() -> None:
    batch = next(text.Batches(as_bytes(bytes(range(10))), rows=200, context=7, seed=0))
    assert set(batch["tokens"][:, 0].tolist()) == {0, 1, 2}


def test_batches_same_seed_same_batches() -> None:
    source = as_bytes(bytes(range(200)))
    first, again, other = (
        np.stack([batch["tokens"] for batch in islice(text.Batches(source, rows=4, context=7, seed=seed), 3)])
        for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_batches_are_fresh_memory() -> None:
    source = as_bytes(bytes(range(20)))
    stream = text.Batches(source, rows=4, context=7, seed=0)
    first, second = next(stream)["tokens"], next(stream)["tokens"]
    assert not np.shares_memory(first, second)
    assert not np.shares_memory(first, source)


def test_batches_text_of_one_window_is_enough() -> None:
    batch = next(text.Batches(as_bytes(b"abc"), rows=2, context=2, seed=0))
    assert batch["tokens"].tolist() == [[97, 98, 99], [97, 98, 99]]


def test_batches_short_text_raises() -> None:
    with pytest.raises(sc.ConfigError, match=r"3 \+ 1 bytes does not fit into 3 bytes"):
        next(text.Batches(as_bytes(b"abc"), rows=2, context=3, seed=0))


def test_validation_batches_span_the_text() -> None:
    found = text.validation_batches(as_bytes(bytes(range(100))), rows=2, context=9, num_batches=2)
    assert [batch["tokens"][:, 0].tolist() for batch in found] == [[0, 30], [60, 90]]


def test_bigram_loss_is_that_of_smoothed_counts() -> None:
    # b follows a twice of two times; nothing follows c.
    held_out = ({"tokens": np.array([[97, 98], [99, 97]], np.int32)},)
    expected = (-np.log((2 + 1) / (2 + 256)) - np.log(1 / 256)) / 2
    assert text.bigram_loss(as_bytes(b"abab"), held_out) == pytest.approx(expected, rel=1e-12)  # order of logs


def test_bigram_loss_does_not_charge_the_first_byte() -> None:
    train = as_bytes(b"ab" * 100)
    known, unknown = ({"tokens": np.array([[first, 98, 97]], np.int32)} for first in (97, 200))
    pairs_known, pairs_unknown = (text.bigram_loss(train, (one,)) for one in (known, unknown))
    assert pairs_unknown - pairs_known == pytest.approx((np.log(256) - np.log(356 / 101)) / 2)


def test_batches_go_on_from_where_they_were() -> None:
    source = as_bytes(bytes(range(256)))
    stream = text.Batches(source, rows=4, context=7, seed=0)
    next(stream)
    place = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream)["tokens"] for _ in range(3)]
    again = text.Batches(source, rows=4, context=7, seed=1)
    again.set_state(place)
    np.testing.assert_array_equal([next(again)["tokens"] for _ in range(3)], expected)
