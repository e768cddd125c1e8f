"""Bad data: rows 19 to 33 of the catalogue of faults."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, iterate, step
from waiting import eventually

import stepc as sc

fault = pytest.mark.fault
ALL = list(range(1, 9))


def run_on(data: Any, **options: Any) -> sc.Run:
    """Options of `sc.Data` and of `sc.run`."""
    of_data = {name: options.pop(name) for name in ("prefetch", "short_batches", "timeout_seconds") if name in options}
    return sc.run(step(), fresh(), sc.Data(data, **of_data), **options)


@fault("19", "OSError once at batch 4, policy raise", "DataError of step 4 from it; the state of step 3 is in `.run`")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_read_that_fails_is_raised(prefetch: int) -> None:
    with pytest.raises(sc.DataError) as raised:
        run_on(FaultPlan({4: "read"}).batches(8), prefetch=prefetch)
    error = raised.value
    assert (error.step, error.phase, error.state_ok) == (4, "data", True)
    assert isinstance(error.__cause__, OSError)
    assert digest(error.run.state) == digest(by_a_plain_loop([1, 2, 3]))


@fault("19", "OSError once at two places, policy retry", "read again at the same place; bitwise as without the fault")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_retry_reads_again_at_the_same_place(prefetch: int) -> None:
    policy = {"data": sc.Retry(1, wait_seconds=0.01)}
    run = run_on(FaultPlan({4: "read", 6: "read"}).batches(8), prefetch=prefetch, on_error=policy)
    assert digest(run.state) == digest(by_a_plain_loop(ALL))
    assert run.failures == {"data": 2}


class Forgetful:
    """An iterator that loses the batch on which it fails, as some loaders do."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> "Forgetful":
        return self

    def __next__(self) -> Any:
        self.given += 1
        if self.given > 8:
            raise StopIteration
        if self.given in (3, 5):
            raise OSError("unreadable")
        return batch_of(self.given)


@fault("19", "OSError at two batches, policy skip", "the state of a run without them; counted; event")
@pytest.mark.parametrize("prefetch", [0, 3])
def test_skip_goes_on_with_the_next_batch(prefetch: int) -> None:
    logger = Remembering()
    run = run_on(Forgetful(), on_error="skip", prefetch=prefetch, loggers=[logger])
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 4, 6, 7, 8]))
    assert (run.skipped, run.steps, logger.names().count("failure")) == (2, 6, 2)


@fault("20", "OSError for ever at one place", "DataError after as many skips, or retries, as are allowed")
@pytest.mark.parametrize("policy", [sc.Skip(limit=3), sc.Retry(3, wait_seconds=0)])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_read_that_fails_for_ever_is_bounded(policy: Any, prefetch: int) -> None:
    plan = FaultPlan({4: "read_always"})
    with pytest.raises(sc.DataError) as raised:
        run_on(plan.batches(8), on_error={"data": policy}, prefetch=prefetch)
    assert plan.happened[4] == 4
    assert raised.value.__notes__


@fault("21", "a generator that raises, under skip and retry", "DataError that says so, never a normal end")
@pytest.mark.parametrize("policy", ["skip", sc.Retry(2, wait_seconds=0)])
def test_generator_that_raises_is_an_error(policy: Any) -> None:
    with pytest.raises(sc.DataError, match="A generator cannot continue after it raises") as raised:
        run_on(iterate(FaultPlan({4: "read"}).batches(8)), on_error={"data": policy})
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.run.steps == 3


@fault("22", "data that ends before `steps`", 'a normal end, `ended="data"`, with a checkpoint of the last step')
def test_data_that_ends_early_is_a_normal_end(tmp_path: Any) -> None:
    run = run_on(FaultPlan().batches(5), steps=100, checkpoint=sc.Checkpoints(tmp_path, every=50))
    assert (run.ended, run.steps) == ("data", 5)
    assert (tmp_path / "5").is_dir()


@fault("23", "no batch at all", "DataError")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_batch_at_all_is_an_error(prefetch: int) -> None:
    with pytest.raises(sc.DataError, match="no batch at all"):
        run_on([], prefetch=prefetch)


def changed(**leaves: Any) -> dict[str, Any]:
    return {key: value for key, value in {**batch_of(4), **leaves}.items() if value is not None}


BAD = {
    "missing_key": (changed(y=None), "y  expected host float32[4], got nothing"),
    "extra_key": (changed(z=np.zeros(4)), "z  expected nothing, got host float64[4]"),
    "rank": (changed(y=np.zeros((4, 1), np.float32)), "y  expected host float32[4], got host float32[4, 1]"),
    "dtype": (changed(y=np.zeros(4, np.int32)), "y  expected host float32[4], got host int32[4]"),
    "wide_dtype": (changed(y=np.zeros(4)), "y  expected host float32[4], got host float64[4]"),
    "string": (changed(y=np.array(list("abcd"))), "y  expected numbers, got str"),
    "object": (changed(y=np.array([None] * 4)), "y  expected numbers, got object"),
    "datetime": (changed(y=np.zeros(4, "datetime64[s]")), "y  expected numbers, got datetime64"),
    "masked": (changed(y=np.ma.zeros(4, np.float32)), "y  expected a numpy or jax array, got MaskedArray"),
    "ragged": (changed(y=[[1.0], [1.0, 2.0]]), "y/0/0  expected a numpy or jax array, got float"),
    "none_leaf": ({**batch_of(4), "y": None}, "y  expected a numpy or jax array, got NoneType"),
    "none": (None, "batch  expected a numpy or jax array, got NoneType"),
    "text": ("a batch", "batch  expected a numpy or jax array, got str"),
    "empty": ({}, "batch  expected arrays, got none"),
    "tuple": (tuple(batch_of(4).values()), "expected host"),
    "zero_rows": (batch_of(4, rows=0), "expected at least one row, got float32[0, 3]"),
    "short": (batch_of(4, rows=3), "x  expected host float32[4, 3], got host float32[3, 3]"),
}


@fault("25", f"{len(BAD)} kinds of bad batch after three good ones", "DataError from BatchError: path, expected, got")
@fault("26", "a short batch", "DataError; no second trace")
@fault("27", "a batch of 0 rows", "DataError that names the leaf")
@pytest.mark.parametrize("name", BAD)
def test_bad_batch_is_refused_before_the_step(name: str) -> None:
    bad, told = BAD[name]
    traces = step().traces
    with pytest.raises(sc.DataError) as raised:
        run_on([batch_of(1), batch_of(2), batch_of(3), bad])
    error = raised.value
    assert isinstance(error.__cause__, sc.BatchError)
    assert told in str(error)
    assert (error.step, error.state_ok, error.run.steps) == (4, True, 3)
    assert step().traces in (traces, 1)


@fault("25", "a bad batch, policy skip", "the state of a run without it")
@pytest.mark.parametrize("name", BAD)
def test_bad_batch_can_be_skipped(name: str) -> None:
    batches = [batch_of(1), batch_of(2), BAD[name][0], batch_of(3)]
    assert digest(run_on(batches, on_error="skip").state) == digest(by_a_plain_loop([1, 2, 3]))


@fault("25", "a bad batch, policy retry", "DataError at once: it would be refused again")
def test_bad_batch_is_not_read_again() -> None:
    with pytest.raises(sc.DataError) as raised:
        run_on([batch_of(1), BAD["dtype"][0]], on_error="retry")
    assert raised.value.__notes__ == ["stepc: another read would give the same batch"]


@fault("26", 'a short last batch, short_batches="drop"', "dropped; no second trace")
def test_short_batch_can_be_dropped() -> None:
    run = run_on([batch_of(1), batch_of(2), batch_of(3, rows=2)], short_batches="drop")
    assert digest(run.state) == digest(by_a_plain_loop([1, 2]))


def masked_loss(params: Any, rows: Any) -> sc.Mean:
    error = rows["x"] @ params["w"] - rows["y"]
    return sc.Mean((error**2 * rows["mask"]).sum(), rows["mask"].sum())


def masked(number: int, rows: int = 8) -> dict[str, np.ndarray]:
    return {**batch_of(number, rows=rows), "mask": np.ones(rows, np.float32)}


@fault("26", 'a short last batch, short_batches="pad"', "bitwise as padded by hand; one trace")
@pytest.mark.parametrize("on_devices", [False, True])
def test_short_batch_can_be_padded(on_devices: bool) -> None:
    step = sc.compile(sc.update(optax.adam(0.05)) @ sc.grad(masked_loss))
    batches = [masked(1), masked(2), masked(3, rows=5)]
    given = jax.tree.map(jnp.asarray, batches) if on_devices else batches
    run = sc.run(step, step.init({"w": np.zeros(3, np.float32)}), sc.Data(given, short_batches="pad"))
    assert (run.steps, step.traces) == (3, 1)
    short, is_real = sc.pad_batch(batches[2], 8)
    state = step.init({"w": np.zeros(3, np.float32)})
    for batch in (*batches[:2], {**short, "mask": np.float32(is_real)}):
        state, metrics = step(state, batch)
    assert digest(run.state) == digest(state)
    assert run.metrics["loss"] == float(metrics["loss"])
    # The loss is that of the five real rows; without padding it is summed in another order.
    state, metrics = step(sc.run(step, step.init({"w": np.zeros(3, np.float32)}), batches[:2]).state, batches[2])
    assert abs(run.metrics["loss"] - float(metrics["loss"])) <= 1e-6 * run.metrics["loss"]


@fault("26", 'short_batches="pad", batches without a mask; a step that repeats', "refused, with what to write")
def test_padding_needs_a_mask_and_rows_on_the_first_axis() -> None:
    with pytest.raises(sc.DataError) as raised:
        run_on([batch_of(1)], short_batches="pad")
    assert isinstance(raised.value.__cause__, sc.BatchError)
    assert "needs a mask" in str(raised.value.__cause__)
    repeating = sc.compile(sc.repeat(2) @ sc.update(optax.sgd(0.1)) @ sc.grad(masked_loss))
    with pytest.raises(sc.ConfigError, match="short_batches"):
        sc.run(repeating, fresh(), sc.Data([masked(1)], short_batches="pad"))


@fault("28", "an int64 that int32 cannot hold, in a later batch", "DataError with the range; smaller ones are taken")
def test_integer_that_jax_would_truncate_is_refused(tmp_path: Path) -> None:
    fits = {**batch_of(1), "n": np.arange(4)}
    with pytest.raises(sc.DataError, match="from 0 to 1099511627776"):
        run_on([fits, {**fits, "n": np.array([0, 1, 2, 2**40])}])
    assert run_on([fits]).steps == 1
    numbers = np.memmap(tmp_path / "numbers", np.int64, "w+", shape=(4,))
    numbers[:] = [0, 1, 2, 2**40]
    with pytest.raises(sc.DataError, match="from 0 to 1099511627776"):
        run_on([{**fits, "n": numbers}])


@fault("30", "a loader that reuses its buffer", "bitwise as with new arrays, windows 0, 2 and 8")
@pytest.mark.parametrize("window", [0, 2, 8])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_loader_that_reuses_its_buffer_changes_nothing(window: int, prefetch: int) -> None:
    def one_buffer() -> Iterator[Any]:
        buffer = batch_of(1)
        for number in range(1, 21):
            for name, leaf in batch_of(number).items():
                buffer[name][:] = leaf
            yield buffer

    run = run_on(one_buffer(), buffers=sc.Buffers(in_flight=window), prefetch=prefetch)
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 21))))


@fault("32", "a loader whose thread ends by an exception", "DataError, not a hang; no thread of ours is left")
def test_loader_that_raises_in_its_thread_does_not_hang() -> None:
    with pytest.raises(sc.DataError):
        run_on(iterate(FaultPlan({3: "read"}).batches(8)), prefetch=2)
    eventually(lambda: "stepc-data" not in [one.name for one in threading.enumerate()])


@fault("33", "data without get_state, with checkpoints", "works; event resume_not_exact; or ConfigError if asked for")
def test_data_without_a_position_is_logged(tmp_path: Any) -> None:
    logger = Remembering()
    run = run_on([batch_of(1)], checkpoint=sc.Checkpoints(tmp_path, every=5), loggers=[logger])
    assert run.steps == 1
    assert "resume_not_exact" in logger.names()
    exact = sc.Checkpoints(tmp_path / "exact", every=5, exact_resume=True)
    with pytest.raises(sc.ConfigError, match="exact_resume.*cannot say"):
        run_on([batch_of(1)], checkpoint=exact)
    assert run_on(FaultPlan().batches(2), checkpoint=exact).steps == 2


@fault(
    "31",
    "data that hangs, with timeout_seconds=2",
    "DataError while it hangs, no policy goes on; the state is alive",
)
def test_data_that_hangs_is_given_up() -> None:
    def hanging() -> Iterator[Any]:
        yield from map(batch_of, range(1, 4))
        is_free.wait(300)

    is_free, before = threading.Event(), threading.active_count()
    run_on([batch_of(1)])  # compiled
    with pytest.raises(sc.DataError, match=r"no batch arrived within 2 s") as raised:
        run_on(hanging(), prefetch=1, timeout_seconds=2.0, on_error={"data": sc.Retry(3)})
    assert (raised.value.step, raised.value.state_ok) == (4, True)
    assert "the read is still running" in raised.value.__notes__[0]
    assert digest(raised.value.run.state) == digest(by_a_plain_loop([1, 2, 3]))
    is_free.set()
    eventually(lambda: threading.active_count() <= before)
    with pytest.raises(sc.ConfigError, match="prefetch +expected 1 or more with timeout_seconds"):
        run_on([batch_of(1)], timeout_seconds=1.0)


def test_prefetch_reads_while_a_step_runs() -> None:
    read: list[int] = []

    def noting() -> Iterator[Any]:
        for number in range(1, 7):
            read.append(number)
            yield batch_of(number)

    def slow(state: Any, batch: Any) -> Any:
        if int(batch["n"][0]) == 1:
            eventually(lambda: len(read) >= 4)
        return step()(state, batch)

    run = sc.run(slow, fresh(), sc.Data(noting(), prefetch=3))
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 7))))
    assert len(read) == 6
    eventually(lambda: "stepc-data" not in [one.name for one in threading.enumerate()])
