"""The contract of a loss, held while it is traced: what it returns, and that what it divides by is only counted."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from stepc._compiler.schedule import LossSignature
from stepc._core.nodes import DifferentiateNode
from stepc._jax import dce_jaxpr
from stepc._language.kinds import BatchRows, Params
from stepc._language.state import leaves_by_path
from stepc._language.terms import (
    AbstractTerms,
    Last,
    LossOutcome,
    Max,
    Mean,
    Metric,
    Min,
    Sum,
    is_static,
    loss_outcome,
    merge_terms,
)
from stepc.errors import LossError, ShardingError, faults_in_one

# What else a step reports under a name of its own.
RESERVED = ("loss", "grad_norm", "skipped", "loss_scale")
# Implementations whose draws for one key do not depend on how many keys are drawn from side by side.
BATCH_STABLE = ("threefry2x32",)
Call = Callable[[Params, BatchRows, Any, Any], LossOutcome]  # Any, twice: typed keys, and a tree of the user's; or None


def checked_loss(node: DifferentiateNode) -> Call:
    """The loss, called as the node says and held to its contract.

    Errors: LossError; what the loss itself raises passes through unchanged, with a note.
    """

    def call(params: Params, rows: BatchRows, keys: Any, model_state: Any) -> LossOutcome:
        given = (*(() if node.rng is None else (keys,)), *((model_state,) if node.model_state else ()))
        try:
            returned = node.function(params, rows, *given)
        except NameError as error:
            if "unbound axis name" not in str(error):
                raise _noted(error, node, rows) from None
            raise _names_an_axis(error, node) from error
        except Exception as error:  # the user's own: it passes through as itself
            _noted(error, node, rows)
            raise
        _check_returned(returned, node)
        outcome = loss_outcome(returned, has_aux=node.has_aux, model_state=node.model_state)
        if node.model_state:
            _check_model_state(model_state, outcome.model_state, node)
        return outcome

    return call


def trace_loss_signature(
    node: DifferentiateNode, params: Params, rows: BatchRows, key: Any, model_state: Any, manual: tuple[str, ...]
) -> LossSignature:
    """What a loss returns for such rows.

    Args: shapes, of one cell each; the key is that of the state; the axes of which a loss sees only its own rows.
    Errors: LossError if a count depends on the parameters or on the model_state, or if the keys cannot be one a row;
      ShardingError if the loss constrains something to lie along a manual axis.
    """
    if node.rng == "example":
        _check_keys(key, node)
    keys = None if node.rng is None else keys_of(node, key, jax.ShapeDtypeStruct((num_rows(rows),), jnp.int32))
    signature, traced, outputs = _traced(node, params, model_state, rows, keys)
    _check_axes(traced, node, manual)
    if outputs:
        _check_counts(depends_on(traced, outputs=outputs)[0], params, model_state, node)
    return signature


def counts_of(node: DifferentiateNode, params: Params, model_state: Any, rows: BatchRows, keys: Any) -> list[jax.Array]:
    """The counts of the terms of the loss that the rows decide, at no cost but that of counting."""
    _, traced, outputs = _traced(node, params, model_state, rows, keys)
    counts = depends_on(traced, outputs=outputs)[1](jax.tree.leaves((params, model_state, rows, keys)))
    return [jnp.asarray(count) for count in counts]


def _traced(
    node: DifferentiateNode, params: Params, model_state: Any, rows: BatchRows, keys: Any
) -> tuple[LossSignature, Any, range]:
    """What the loss returned, its operations, and which of their results are counts that the rows decide."""
    signatures: list[LossSignature] = []

    def totals_and_counts(params: Params, model_state: Any, rows: BatchRows, keys: Any) -> tuple[list[Any], list[Any]]:
        outcome = checked_loss(node)(params, rows, keys, model_state)
        terms, metrics = merge_terms(outcome.terms), outcome.metrics.values()
        signatures.append(
            LossSignature(
                tuple(float(one.count) if is_static(one.count) else None for one in terms),
                tuple(sorted({kind for one in metrics if (kind := _kind_apart(one))})),
                any(isinstance(one, Last) for one in metrics),
                tuple(sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(outcome.model_state)})),
            )
        )
        return [one.total for one in terms], [one.count for one in terms if not is_static(one.count)]

    traced, (totals, counts) = jax.make_jaxpr(totals_and_counts, return_shape=True)(params, model_state, rows, keys)
    return signatures[0], traced, range(len(totals), len(totals) + len(counts))


def _kind_apart(metric: Metric) -> str | None:
    """What keeps a metric out of the sum of the gradient, if anything does."""
    match metric:
        case Max() | Min():
            return type(metric).__name__.lower()
        case Sum(value) | Last(value) if not jnp.issubdtype(value.dtype, jnp.floating):
            return "whole numbers"
        case _:
            return None


def _check_counts(needs: list[bool], params: Params, model_state: Any, node: DifferentiateNode) -> None:
    paths = [f"params/{path}".rstrip("/") for path, _ in leaves_by_path(params)]
    paths += [f"model_state/{path}".rstrip("/") for path, _ in leaves_by_path(model_state)]
    if used := [path for path, needed in zip(paths, needs, strict=False) if needed]:
        raise LossError(
            f"A count of the loss of `{node.written}` depends on the parameters, or on the model_state.",
            facts=(("depends on", ", ".join(f"`{path}`" for path in used)),),
            suggestion="Count rows or tokens: `sc.Mean(total, count)` is divided by the count, which has no gradient.",
        )


def _check_axes(traced: Any, node: DifferentiateNode, manual: tuple[str, ...]) -> None:
    named = [(what, axis, line) for what, axes, line in named_axes(traced) for axis in axes if axis in manual]
    if not named:
        return
    faults = [f"`{what}` names the axis {axis!r}{line and f' ({line})'}." for what, axis, line in dict.fromkeys(named)]
    axes = " and ".join(sorted({repr(axis) for _, axis, _ in named}))
    what = faults_in_one(faults, of=f"the loss of `{node.written}`")
    raise ShardingError(
        f"The loss of `{node.written}`: {what}" if len(faults) == 1 else what,
        facts=(("reason", f"rows lie along {axes}, and a loss is called with the rows of one device"),),
        suggestion=f"Leave {axes} out there, or write `shard(dp(...), mode='auto')`, which leaves the axis to XLA.",
    )


def keys_of(node: DifferentiateNode, key: Any, numbers: Any) -> Any:  # Any: typed keys, or their shapes
    """The keys that the loss is given for the rows of these numbers."""
    if isinstance(numbers, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda key, numbers: keys_of(node, key, numbers), key, numbers)
    if node.rng == "example":
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    return jax.random.fold_in(key, numbers[0])


def num_rows(rows: BatchRows) -> int:
    """How many rows a cell has."""
    return jax.tree.leaves(rows)[0].shape[0]


def _check_returned(returned: Any, node: DifferentiateNode) -> None:
    wanted = ("value", *(("metrics",) if node.has_aux else ()), *(("model_state",) if node.model_state else ()))
    if len(wanted) > 1 and not (isinstance(returned, tuple) and len(returned) == len(wanted)):
        facts = (("expected", f"a tuple ({', '.join(wanted)})"), ("got", described(returned)))
        raise LossError(f"The loss of `{node.written}` does not return what it promises.", facts=facts)
    value = returned[0] if len(wanted) > 1 else returned
    for term in value.terms if isinstance(value, AbstractTerms) else (value,):
        _check_value(term, node)
    if node.has_aux:
        _check_metrics(returned[1], node)


def _check_value(value: Any, node: DifferentiateNode) -> None:
    total = value.total if isinstance(value, Mean) else value
    what = f"The loss of `{node.written}` does not return a scalar"
    facts = (("expected", "a floating-point scalar, a mean over the rows"), ("got", described(value)))
    if isinstance(value, Mean):
        what = f"The loss of `{node.written}` returns a `Mean` that is not of two scalars"
        facts = (("expected", "a floating-point total, a sum over the rows, and a count"), ("got", described(value)))
        if not _is_scalar(value.count):
            raise LossError(f"{what}.", facts=facts, suggestion="Write `.sum()` over the rows.")
    if not isinstance(total, (jax.Array, np.ndarray, np.generic, float, int)):
        raise LossError(f"{what}.", facts=facts)
    if jnp.shape(total) != ():
        remedy = "Write `.sum()` over the rows." if isinstance(value, Mean) else "Write `.mean()` over the rows."
        raise LossError(f"{what}.", facts=facts, suggestion=remedy)
    if not jnp.issubdtype(jnp.result_type(total), jnp.floating):
        raise LossError(f"{what} that has a gradient.", facts=facts)


def _check_metrics(metrics: Any, node: DifferentiateNode) -> None:
    if not isinstance(metrics, dict):
        facts = (("expected", "a dict of scalars by name"), ("got", described(metrics)))
        raise LossError(f"The metrics of `{node.written}` are not a dict.", facts=facts)
    faults = [f"`{name}` is a name that the step itself reports." for name in metrics if name in RESERVED]
    for name, metric in metrics.items():
        numbers = jax.tree.leaves(metric) if isinstance(metric, Metric) else [metric]
        faults += [
            f"`{name}` is {described(number)}; a metric is a scalar, or sc.Mean, Sum, Max, Min, Last."
            for number in numbers
            if not _is_scalar(number)
        ]
    if faults:
        raise LossError(_sentence(faults_in_one(faults, of=f"the metrics of `{node.written}`")))


def _check_model_state(before: Any, after: Any, node: DifferentiateNode) -> None:
    old, new = (dict(leaves_by_path(one)) for one in (before, after))
    faults = [f"`model_state/{path}` is not returned." for path in old if path not in new]
    faults += [f"`model_state/{path}` was not given." for path in new if path not in old]
    for path in old.keys() & new.keys():
        if described(old[path]) != described(new[path]):
            faults.append(
                f"`model_state/{path}` goes in as {described(old[path])} and comes out as {described(new[path])}."
            )
    if faults or jax.tree.structure(before) != jax.tree.structure(after):
        told = faults_in_one(sorted(faults) or ["the tree is another one."], of="the model_state")
        raise LossError(f"The model_state of `{node.written}` does not come out as it went in: {told}")


def _check_keys(key: Any, node: DifferentiateNode) -> None:
    names: list[str] = []
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), key)
    if (name := names[0]) not in BATCH_STABLE:
        facts = (
            ("implementation", name),
            ("reason", "what one of its keys draws depends on how many keys are drawn from side by side"),
            ("stable", ", ".join(BATCH_STABLE)),
        )
        raise LossError(
            f"`{node.written}` asks for one key a row, and this implementation of keys cannot give them.",
            facts=facts,
            suggestion='Give `init` a number as its seed, or write `rng="microbatch"`.',
        )


def _names_an_axis(error: NameError, node: DifferentiateNode) -> LossError:
    found = re.search(r"unbound axis name: (\w+)", str(error))
    axis = found.group(1) if found else "of the mesh"
    return LossError(
        f"The loss of `{node.written}` names the mesh axis {axis!r}.",
        facts=(("reason", "a loss is a function of its own rows; in the reference there is no mesh"),),
        suggestion="Return the mean over the rows that the loss is given; `shard` averages over the axis.",
    )


def _noted(error: Exception, node: DifferentiateNode, rows: BatchRows) -> Exception:
    shapes = ", ".join(f"{path or 'rows'} {described(leaf)}" for path, leaf in leaves_by_path(rows))
    error.add_note(f"stepc: raised by the loss of `{node.written}` while it was traced on one cell: {shapes}")
    return error


def described(value: Any) -> str:
    """The dtype and shape of an array, the type of anything else."""
    if isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mean):
        return f"Mean({described(value.total)}, {described(value.count)})"
    return type(value).__name__


def _is_scalar(number: Any) -> bool:
    return isinstance(number, jax.Array | np.ndarray | np.generic | float | int) and jnp.shape(number) == ()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def depends_on(
    traced: ClosedJaxpr, *, outputs: Iterable[int]
) -> tuple[list[bool], Callable[[Sequence[Any]], list[Any]]]:
    """Of each input, whether any of these outputs depends on it; and the function that computes just these outputs.

    Args:
      traced: what `jax.make_jaxpr` returned.
      outputs: their positions.
    The function takes all inputs, as a flat list, and runs only what the outputs depend on: dead code is cut, also
    inside loops and branches. Where this jax cannot do that, the answer errs towards dependence.
    """
    wanted = set(outputs)
    if dce_jaxpr is None:
        return _by_equations(traced, wanted), lambda given: _picked(jaxpr_as_fun(traced)(*given), wanted)
    used = [n in wanted for n in range(len(traced.jaxpr.outvars))]
    jaxpr, needs = dce_jaxpr(_silent(traced.jaxpr), used)
    alone = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))
    return needs, lambda given: alone(*(one for one, needed in zip(given, needs, strict=True) if needed))


def named_axes(traced: ClosedJaxpr) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Every constraint and every region of its own in a traced function: what it is, the axes, and where it stands."""
    for equation in _equations(traced.jaxpr):
        match equation.primitive.name:
            case "sharding_constraint":
                spec = equation.params["sharding"].spec
                entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
                axes = tuple(axis for entry in entries for axis in entry if isinstance(axis, str))
                yield "with_sharding_constraint", axes, _line(equation)
            case "shard_map":
                yield "shard_map", tuple(sorted(equation.params.get("newly_manual_axes", ()))), _line(equation)
            case _:
                pass


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:  # Any: a jax.extend.core.JaxprEqn
    for equation in jaxpr.eqns:
        yield equation
        for part in equation.params.values():
            for inner in part if isinstance(part, tuple | list) else (part,):
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _line(equation: Any) -> str:  # Any: a jax.extend.core.JaxprEqn
    """The user's own line; empty where this jax does not tell."""
    ours = (str(Path(jax.__file__).parent), str(Path(__file__).parent.parent))
    try:
        frames = equation.source_info.traceback.frames
    except AttributeError:
        return ""
    frame = next((frame for frame in frames if not frame.file_name.startswith(ours)), None)
    return "" if frame is None else f"{Path(frame.file_name).name}:{frame.line_num}"


def _silent(jaxpr: Jaxpr) -> Jaxpr:
    """Without what only prints or reports: it would count as needed, and with it all that it looks at."""
    equations = []
    for equation in jaxpr.eqns:
        if equation.outvars or not equation.effects:
            params = {name: _silent_part(part) for name, part in equation.params.items()}
            equations.append(equation.replace(params=params, effects=set()) if equation.effects else equation)
    return jaxpr.replace(eqns=equations, effects=set())


def _silent_part(part: Any) -> Any:
    match part:
        case Jaxpr():
            return _silent(part)
        case ClosedJaxpr():
            return ClosedJaxpr(_silent(part.jaxpr), part.consts)
        case tuple() | list():
            return type(part)(map(_silent_part, part)) if type(part) in (tuple, list) else part
        case _:
            return part


def _by_equations(traced: ClosedJaxpr, wanted: set[int]) -> list[bool]:
    needed = {id(var) for n, var in enumerate(traced.jaxpr.outvars) if n in wanted}
    for equation in reversed(traced.jaxpr.eqns):
        if any(id(var) in needed for var in equation.outvars):
            needed |= {id(var) for var in equation.invars}
    return [id(var) in needed for var in traced.jaxpr.invars]


def _picked(results: Sequence[Any], wanted: set[int]) -> list[Any]:
    return [one for n, one in enumerate(results) if n in wanted]
