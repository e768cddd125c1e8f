"""Exact metrics over all rows of several batches. It must not know of a run."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc._language.kinds import Batch, HostMetrics, Params
from stepc._language.state import State, as_arrays, leaves_by_path
from stepc._language.terms import AbstractTerms, Last, Max, Mean, Metric, Min, Sum, Sums, combine_metrics
from stepc._runner.arguments import ArgumentFaults
from stepc._runner.data import checked
from stepc._runner.pending import CompiledStep
from stepc.errors import ConfigError

IN_FLIGHT = 2  # batches that are evaluated before the first of them is waited for


def evaluate(
    fn: Callable[[Params, Batch], Any],  # Any: metrics, or a loss
    params: Params,
    data: Iterable[Batch],
    *,
    mesh: Mesh | None = None,
) -> dict[str, float | np.ndarray]:
    """Evaluate parameters on all rows of some data, exactly.

    Meaning: each metric of `fn(params, batch)` over the rows of all of `data`. Totals and counts of an `sc.Mean` are
      added up, then divided once; an `sc.Sum`, `Max`, `Min` or `Last` is that of all batches; a plain number is the
      mean of its batch, and weighs as much as the batch has rows. Added up on the host, in float64.
    Why: the mean of the means of batches is another number as soon as the last batch is short.

    Args:
      fn: a function of parameters and a batch that returns a dict of metrics; or a loss, which is then "loss": a number
        or an `sc.Mean`, alone or with a dict of metrics. It is jitted.
      params: whatever `fn` takes: a tree of arrays. Of a state with `tp(..., pad=True)`: `state.unpadded().params`.
      data: batches. Each of another number of rows is compiled once.
      mesh: where to evaluate. Rows are split over those of its axes over which no parameter is sharded, and replicated
        where they do not divide; parameters that are not on the mesh are replicated. None: where the parameters are.
    Errors: FieldTypeError or ConfigError with all faults; BatchError for a batch that holds no arrays. What `fn` raises
      passes through.
    In one process. On several, and in a run, it is `sc.Eval(every, evaluate, data)`.
    Example:
      >>> sc.evaluate(lambda params, batch: {"mean": batch["x"].mean()}, {}, [{"x": np.ones(2)}, {"x": np.zeros(6)}])
      {'mean': 0.25}

    Source: ours.
    """
    _check(fn, params, data, mesh)
    program = jax.jit(fn)
    if mesh is not None:
        devices = set(mesh.devices.flat)
        params = jax.tree.map(
            lambda leaf: (
                leaf if _devices_of(leaf) == devices else jax.device_put(leaf, NamedSharding(mesh, REPLICATED))
            ),
            params,
        )
    split = None if mesh is None else _axes_of_rows(params, mesh)
    sums = MetricSums()
    pending: deque[tuple[Any, tuple[int, ...]]] = deque()  # Any: what `fn` returns
    for one in data:
        batch = as_arrays(one)
        checked(batch, None)
        rows = tuple(np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf))
        placed = batch if mesh is None or split is None else jax.device_put(batch, _placement(batch, mesh, split))
        try:
            pending.append((program(params, placed), rows))
        except Exception as error:
            if isinstance(params, State):
                error.add_note(
                    "stepc: `params` is a state; `sc.evaluate(fn, state.params, data)` gives its parameters."
                )
            raise
        while len(pending) > IN_FLIGHT:
            _add(sums, *pending.popleft())
    while pending:
        _add(sums, *pending.popleft())
    if not sums.num_batches:
        raise ConfigError("The data of `evaluate` gave no batch.")
    return dict(sums.values())


REPLICATED = PartitionSpec()


def _check(fn: object, params: Params, data: object, mesh: object) -> None:
    faults = ArgumentFaults("evaluate")
    if isinstance(fn, CompiledStep):
        remedy = "In a run, `sc.Eval(every, step, data)` evaluates by a step. Here, give the loss."
        faults.mistaken("fn", "a function of parameters and a batch", repr(fn), remedy)
    else:
        faults.callable_("fn", fn, "a function of parameters and a batch")
    for path, leaf in leaves_by_path(params):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            faults.wrong_type(f"params {path}".rstrip(), "an array", leaf)
        elif isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            faults.wrong_value(f"params {path}".rstrip(), "an array of this process", f"one of {leaf.sharding}")
    if isinstance(data, Mapping):
        faults.mistaken("data", "an iterable of batches", "one batch: a dict", "Put it in a list: `[batch]`.")
    else:
        faults.instance("data", data, Iterable, "an iterable of batches")
    if faults.instance("mesh", mesh, (Mesh, type(None)), "a jax.sharding.Mesh or None") and isinstance(mesh, Mesh):
        others = {device.process_index for device in mesh.devices.flat} - {jax.process_index()}
        if others:
            faults.wrong_value("mesh", "the devices of this process", f"also those of {sorted(others)}")
    faults.refuse()


def _devices_of(leaf: Any) -> set[Any]:  # Any: an array, or a number; devices
    return leaf.sharding.device_set if isinstance(leaf, jax.Array) else set()


def _axes_of_rows(params: Params, mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh over which no parameter is sharded."""
    used = {
        axis
        for leaf in jax.tree.leaves(params)
        if isinstance(leaf.sharding, NamedSharding)
        for entry in leaf.sharding.spec
        if entry is not None
        for axis in (entry if isinstance(entry, tuple) else (entry,))
    }
    return tuple(axis for axis in mesh.axis_names if axis not in used)


def _placement(batch: Batch, mesh: Mesh, axes: tuple[str, ...]) -> Any:  # Any: shardings like the batch
    size = int(np.prod([mesh.shape[axis] for axis in axes]))
    spec = PartitionSpec(axes)
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec if np.ndim(leaf) and np.shape(leaf)[0] % size == 0 else REPLICATED), batch
    )


def _add(sums: "MetricSums", result: Any, rows: tuple[int, ...]) -> None:  # Any: what `fn` returns
    match result:
        case Mapping():
            named = result
        case (value, Mapping() as metrics):
            named = {"loss": value, **metrics}
        case _:
            named = {"loss": result}
    sums.add(named, rows, rows[0] if len(set(rows)) == 1 else 1)


@dataclass
class MetricSums:
    """Metrics, added up over batches on the host, in float64.

    Args:
      num_steps: how many steps each metric is of, where a step evaluates; its metrics have no rows.
    """

    num_steps: int | None = None
    num_batches: int = 0
    _sums: dict[str, Metric] = field(default_factory=dict)
    _sizes: set[tuple[int, ...]] = field(default_factory=set)

    def add(self, metrics: Mapping[str, Any], rows: tuple[int, ...], num_rows: int) -> None:  # Any: metrics
        """Add those of one batch.

        Args:
          rows: those of each leaf of the batch.
          num_rows: those of the batch, over all processes; 1 if its leaves have other numbers of them.
        Errors: ConfigError for a plain number of which the weight is not known.
        """
        self.num_batches += 1
        self._sizes.add(rows)
        for name, value in metrics.items():
            is_known = len(self._sizes) == 1 or all(len(set(one)) == 1 for one in self._sizes)
            if not isinstance(value, Metric) and not is_known:
                got = ", ".join(map(str, rows)) or "none"
                raise ConfigError(
                    f"The rows by which `{name}` is weighed are not known: the leaves of the batch have {got} rows. "
                    "Return `sc.Mean(total, count)`."
                )
            one = _on_host(value, num_rows, self.num_steps)
            self._sums[name] = one if name not in self._sums else _added(self._sums[name], one)

    def values(self) -> HostMetrics:
        """Each metric over all batches."""
        return {name: _number(metric) for name, metric in self._sums.items()}


def _on_host(
    value: Any, rows: int, num_steps: int | None
) -> Metric:  # Any: a metric, an array, or a number for each row
    match value:
        case AbstractTerms():
            return Sums(tuple(Mean(_float64(term.total), _float64(term.count)) for term in value.terms))
        case Sum(number) | Max(number) | Min(number) | Last(number):
            return type(value)(_float64(number))
        case _:
            array = _float64(value)
            if array.ndim and (array.shape == (rows,) if num_steps is None else num_steps > 1):
                array = array.mean(axis=0)
            return Sums((Mean(array * rows, rows),))


def _float64(value: Any) -> Any:  # Any: a number or an array; an array of numpy
    return np.asarray(value, np.float64)


def _added(first: Metric, second: Metric) -> Metric:
    match first, second:
        case Max(), Max():
            return Max(np.maximum(first.value, second.value))  # jax would round them to float32
        case Min(), Min():
            return Min(np.minimum(first.value, second.value))
        case _:
            return combine_metrics(first, second)


def _number(metric: Metric) -> float | np.ndarray:
    match metric:
        case AbstractTerms():
            counts = [np.asarray(term.count) for term in metric.terms]
            pairs = zip(metric.terms, counts, strict=True)
            value = sum(np.where(count == 0, 0.0, term.total / np.where(count == 0, 1, count)) for term, count in pairs)
        case Sum(value) | Max(value) | Min(value) | Last(value):
            pass
    return np.asarray(value) if np.ndim(value) else float(value)
