"""The user's loss: how it is called, what it must return, and what its jaxpr says of its counts and mesh axes."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, update_wrapper
from itertools import chain, compress
from operator import or_
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.sharding import NamedSharding

from stepc._compiler.collectives import as_on_one_device, on_every_device
from stepc._compiler.convolutions import CONVOLUTION
from stepc._compiler.layers import TracedFunction, programs_in, stacked_inputs, trace_function, whole_inputs
from stepc._compiler.rows import RowUse, encoder_row_use, is_of_jax, loss_row_use, row_uses, user_line
from stepc._compiler.schedule import HeadStructure, LossStructure, ModelStateLeaf
from stepc._core.nodes import DifferentiateNode
from stepc._jax import dce_jaxpr, mesh_of_step, scan_counts
from stepc._language.encoded import Encoded, EncodedTree, take_apart
from stepc._language.kinds import BatchRows, Params
from stepc._language.model_state import explicit_rule, is_overwritten, rules_by_leaf
from stepc._language.state import (
    ARRAY_LIKE,
    describe_leaf,
    is_trained,
    leaves_by_path,
    same_tree,
    trained_leaves,
    with_frozen,
)
from stepc._language.terms import (
    AbstractTerms,
    Last,
    LossOutcome,
    Max,
    Mean,
    Metric,
    Min,
    Sum,
    accumulation_dtype,
    is_static,
    loss_outcome,
    merge_terms,
    sum_arrays,
)
from stepc.errors import LossError, ShardingError, StepcError, faults_in_one, leaf_text, listed

# The metrics that a step reports itself.
RESERVED = ("loss", "grad_norm", "skipped", "loss_scale")
# Key implementations whose draws for one key do not depend on how many keys are vmapped over.
BATCH_STABLE = ("threefry2x32",)
# Primitives that jax lowers where all axes are manual, or none; XLA fails where it should partition the others.
WITHOUT_PARTLY_MANUAL_REGIONS = ("pure_callback", "io_callback", "custom_partitioning")
# Primitives that pass a tangent of each operand of floating-point numbers on.
DIFFERENTIABLE = frozenset(
    """
    abs add add_any broadcast_in_dim concatenate conv_general_dilated convert_element_type copy cos cumsum div
    dot_general dynamic_slice dynamic_update_slice erf exp exp2 expand_dims expm1 gather integer_pow log log1p logistic
    max min mul neg optimization_barrier pad pow reduce_max reduce_min reduce_precision reduce_sum reshape rev rsqrt
    scatter-add select_n sharding_constraint sin slice split sqrt square squeeze sub tanh transpose
    """.split()
)
# Primitives that call a jaxpr with their own inputs. Of any other, each result is taken to depend on all inputs.
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


@dataclass(frozen=True)
class WholeBatch:
    """What the calls of a loss have in common.

    Args:
      num_rows: of the whole batch.
      side_by_side: the transform that computes parts side by side, as written; None if there is none.
      calls: the number of those whose rows a head is given together.
    """

    num_rows: int
    side_by_side: str | None
    calls: int = 1


# Any: as of `Call`, and arrays.
EncoderCall = Callable[[Params, Any, BatchRows, Any, "Reads"], tuple[EncodedTree, Encoded, Any]]
HeadCall = Callable[[Params, EncodedTree, Encoded], LossOutcome]
NamedAxes: TypeAlias = tuple[str, tuple[str, ...], str]  # what names mesh axes, the axes, the user's line
Reads: TypeAlias = Mapping[str, Any]  # Any: a slot of the state, or the number of the step
# Any, twice: the model state, a tree of the user's, and typed keys; or None. `Reads` are what is passed by keyword.
Call = Callable[[Params, Any, BatchRows, Any, Reads], LossOutcome]


def checked_loss(node: DifferentiateNode, *, times: int = 1) -> Call:
    """The loss as a function whose arguments and results do not depend on the node's options.

    Args:
      times: of a loss of the whole batch: how often the head is given what the encoder makes of the rows.
    Errors: LossError for what it takes and returns; what it raises passes through unchanged, with a note.
    """
    if node.head is not None:
        return _checked_composition(node, times)
    _check_arguments(node)

    def call(params: Params, model_state: Any, rows: BatchRows, keys: Any, reads: Reads) -> LossOutcome:
        returned = _returned(node, params, model_state, rows, keys, reads)
        _check_returned(returned, node)
        outcome = loss_outcome(returned, has_aux=node.has_aux, model_state=node.model_state is not None)
        if node.model_state is not None:
            _check_model_state(model_state, outcome.model_state, node)
        return outcome

    return call


def checked_encoder(node: DifferentiateNode) -> EncoderCall:
    """The encoder of a loss of the whole batch, likewise; it returns the structure of z, its arrays, the model state.

    Errors: as of `checked_loss`.
    """
    _check_arguments(node)
    has_state = node.model_state is not None

    def call(
        params: Params, model_state: Any, rows: BatchRows, keys: Any, reads: Reads
    ) -> tuple[EncodedTree, Encoded, Any]:
        returned = _returned(node, params, model_state, rows, keys, reads)
        if has_state and not (isinstance(returned, tuple) and len(returned) == 2):
            facts = (("expected", "a tuple (z, model_state)"), ("got", described(returned)))
            what = f"The encoder of `{node.written}` does not return what its options ask for."
            raise LossError(what, facts=facts)
        z, after = returned if has_state else (returned, None)
        tree, arrays = take_apart(z, num_rows(rows), node.written)
        if has_state:
            _check_model_state(model_state, after, node)
        return tree, arrays, after

    return call


def checked_head(node: DifferentiateNode) -> HeadCall:
    """The head of a loss of the whole batch, likewise, as a function of the parameters, the structure and the arrays.

    Errors: as of `checked_loss`.
    """
    _check_head_arguments(node)
    head = replace(node, model_state=None)

    def call(params: Params, tree: EncodedTree, arrays: Encoded) -> LossOutcome:
        z = tree.join(arrays)
        try:
            returned = node.head(params, z)  # pyright: ignore[reportOptionalCall]
        except Exception as error:  # the user's own, whatever it is: it passes through
            shapes = listed(f"{path or 'z'} {described(leaf)}" for path, leaf in leaves_by_path(z))
            error.add_note(f"stepc: raised by the head of `{node.written}` while it was traced for: {shapes}")
            raise
        _check_returned(returned, head)
        return loss_outcome(returned, has_aux=node.has_aux, model_state=False)

    return call


def _checked_composition(node: DifferentiateNode, times: int) -> Call:
    """The head of what the encoder makes of the rows, given it several times over."""
    encoder, head = checked_encoder(node), checked_head(node)

    def call(params: Params, model_state: Any, rows: BatchRows, keys: Any, reads: Reads) -> LossOutcome:
        tree, arrays, after = encoder(params, model_state, rows, keys, reads)
        if times > 1:
            arrays = Encoded(tuple(jnp.concatenate([leaf] * times) for leaf in arrays.rows), arrays.sums)
        return head(params, tree, arrays)._replace(model_state=after)

    return call


def _returned(
    node: DifferentiateNode, params: Params, model_state: Any, rows: BatchRows, keys: Any, reads: Reads
) -> Any:
    """What the user's own function returns, in its wraps."""
    options = (
        *(() if node.rng is None else (keys,)),
        *(() if node.model_state is None else (same_tree(model_state),)),
    )
    try:
        return node.function(params, rows, *options, **reads)
    except Exception as error:  # the user's own, whatever it is: it passes through
        if (refused := _refused_by_jax(error, node)) is not None:
            raise refused from error
        _add_note(error, node, rows)
        raise


def trace_loss_structure(
    node: DifferentiateNode,
    params: Params,
    rows: BatchRows,
    key: Any,
    model_state: Any,
    reads: Reads,
    manual_axes: tuple[str, ...],
    whole: WholeBatch,
    *,
    is_split: bool,
) -> tuple[LossStructure, TracedFunction | None]:
    """What a loss returns for one local microbatch, from the shapes of its arguments; and its operations.

    The step runs these operations. They are None where it calls the loss instead: for a loss of the whole batch, and
    where there is no trace of it as it runs.

    Args:
      key: the state's, or its shape.
      model_state: the whole of it.
      reads: the shapes of what the loss reads of the state.
      manual_axes: the mesh axes along which the loss sees its own rows only.
      whole: what is known of the batch that the rows are a part of.
      is_split: whether these are not all rows of the batch: then what the loss does with them matters.
    Errors: LossError if a count depends on the parameters or on the model state, if no gradient reaches a parameter, if
      the model state and its rules do not fit the loss, or if the implementation of the keys cannot give one key per
      row; ShardingError if the loss names a manual axis.
    """
    node.check(trained_leaves(params, node.wrt))
    if node.rng == "example":
        _check_keys(key, node)
    keys = keys_of(node, key, jax.ShapeDtypeStruct((num_rows(rows),), jnp.int32))
    if node.model_state is not None:
        model_state = _rows_of_model_state(node, model_state, whole, num_rows(rows))
        _check_sizes(node, (params, model_state, rows, keys), reads, whole)
    given = (params, model_state, rows, keys, reads)
    loss = _trace_in_region(node, given, manual_axes, whole.calls)
    is_of_region = loss is not None
    loss = loss or _trace_under_mesh(node, given, manual_axes, whole.calls)
    traced = loss.function.program
    named = list(named_axes(traced))
    has_own_derivative = any(equation.primitive.name == "custom_vjp_call" for equation in _equations(traced.jaxpr))
    if has_own_derivative and mesh_of_step() is not None:
        # What a derivative of the user's own does is in no jaxpr of the loss itself.
        named += [one for one in named_axes(_trace_gradient(node, given, manual_axes, whole.calls)) if one[1]]
    if any(axis in manual_axes for _, axes, _ in named for axis in axes):
        raise _names_axes_of_rows(named, node, manual_axes)
    if manual_axes:
        _check_regions(traced, node, manual_axes)
    # The operations are read, and run on shapes, where they were traced.
    with as_on_one_device(manual_axes if is_of_region else ()):
        structure = _structure_of(loss, node, given, whole, is_split=is_split)
    named_in_it = frozenset(axis for _, axes, _ in named for axis in axes)
    structure = replace(structure, names_mesh=bool(named), named_axes=named_in_it)
    return structure, loss.function if is_of_region and node.head is None else None


def _structure_of(
    loss: "_TracedLoss", node: DifferentiateNode, given: tuple[Any, ...], whole: WholeBatch, *, is_split: bool
) -> LossStructure:
    """What the operations of a loss say; `given` are the shapes that it was traced for."""
    params, model_state, rows, keys, reads = given
    structure, traced, outputs = loss.structure, loss.function.program, loss.counts
    has_convolutions = any(equation.primitive.name == CONVOLUTION for equation in _equations(traced.jaxpr))
    structure = replace(structure, has_convolutions=has_convolutions)
    if outputs:
        _check_counts(depends_on(traced, outputs=outputs)[0], params, model_state, node)
    _check_reached(traced, range(outputs.start), params, node)
    paths, stacked = [path for path, _ in leaves_by_path(params)], stacked_inputs(traced.jaxpr)
    whole_ones = whole_inputs(traced.jaxpr)
    structure = replace(
        structure,
        stacks=tuple(path for place, path in enumerate(paths) if place in stacked),
        outside=tuple(
            (path, tuple(sorted(whole_ones.get(place, ())))) for place, path in enumerate(paths) if place not in stacked
        ),
    )
    if node.model_state is not None:
        leaves = _model_state_leaves(node, traced, (params, model_state, rows, keys), whole)
        structure = replace(structure, model_state=leaves)
    if node.head is not None:
        structure = _structure_of_head(structure, node, (params, model_state, rows, keys, reads), whole)
        return structure if is_split else replace(structure, row_use=None)
    if not is_split:
        return structure
    if num_rows(rows) == 1:
        return replace(structure, row_use=RowUse("single"))
    of_rows = [False] * len(jax.tree.leaves(params)) + [leaf.rule == "rows" for leaf in structure.model_state]
    of_rows += [True] * len(jax.tree.leaves(rows)) + [node.rng == "example"] * len(jax.tree.leaves(keys))
    of_rows += [False] * len(jax.tree.leaves(reads))
    values = row_uses(traced, of_rows=of_rows, num_rows=num_rows(rows))[: outputs.stop]
    return replace(structure, row_use=loss_row_use(values, structure.counts, num_rows(rows)))


def _structure_of_head(
    structure: LossStructure, node: DifferentiateNode, given: tuple[Any, ...], whole: WholeBatch
) -> LossStructure:
    """With what the head is given, and which parameters it reads; the rows are what the encoder does with them."""
    params, model_state, rows, keys, reads = given
    trees: list[EncodedTree] = []

    def encode(params: Params, model_state: Any, rows: BatchRows, keys: Any, reads: Reads) -> Encoded:
        tree, arrays, _ = checked_encoder(node)(params, model_state, rows, keys, reads)
        trees.append(tree)
        return arrays

    traced, shapes = jax.make_jaxpr(encode, return_shape=True)(params, model_state, rows, keys, reads)
    of_all = tuple(
        jax.ShapeDtypeStruct((leaf.shape[0] * whole.calls, *leaf.shape[1:]), leaf.dtype) for leaf in shapes.rows
    )

    def totals(params: Params, arrays: Encoded) -> list[Any]:
        return [term.total for term in checked_head(node)(params, trees[0], arrays).terms]

    of_head, results = jax.make_jaxpr(totals, return_shape=True)(params, Encoded(of_all, shapes.sums))
    needed, _ = depends_on(of_head, outputs=range(len(results)))
    paths = [path for path, _ in leaves_by_path(params)]
    read = tuple(path for path, is_read in zip(paths, needed, strict=False) if is_read)
    sizes: dict[str, int] = {}
    for leaf in of_all:
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.size * leaf.dtype.itemsize
    of_sums = tuple(dict.fromkeys(leaf.dtype.name for leaf in shapes.sums))
    has_counts = any(count is None for count in structure.counts)
    head = HeadStructure(trees[0], read, tuple(sizes.items()), of_sums, has_counts)
    # The total of the head is a value: there is nothing to divide it by.
    structure = replace(structure, counts=(1.0,), head=head)
    if num_rows(rows) == 1:
        return replace(structure, row_use=RowUse("encoder"))
    of_rows = [False] * len(jax.tree.leaves(params)) + [leaf.rule == "rows" for leaf in structure.model_state]
    of_rows += [True] * len(jax.tree.leaves(rows)) + [node.rng == "example"] * len(jax.tree.leaves(keys))
    of_rows += [False] * len(jax.tree.leaves(reads))
    values = row_uses(traced, of_rows=of_rows, num_rows=num_rows(rows))
    return replace(structure, row_use=encoder_row_use(values, trees[0].kinds, num_rows(rows)))


def counts_of(
    node: DifferentiateNode, params: Params, model_state: Any, rows: BatchRows, keys: Any, reads: Reads
) -> list[jax.Array]:
    """The counts that the rows decide, one per term. The rest of the loss is dead code, and is not run."""
    loss = _trace(node, (params, model_state, rows, keys, reads))
    _, run = depends_on(loss.function.program, outputs=loss.counts)
    counts = run(jax.tree.leaves((params, model_state, rows, keys, reads)))
    return [jnp.asarray(count) for count in counts]


@dataclass(frozen=True)
class _TracedLoss:
    """The operations of a loss, and what it returned.

    Args:
      function: of parameters, model state, rows, keys and what is read. Its program also returns the merged totals and
        counts, first.
      counts: which results of the program are counts that the rows decide.
      structure: what it returned, as far as its types say it.
    """

    function: TracedFunction
    counts: range
    structure: LossStructure


def _trace(node: DifferentiateNode, given: tuple[Any, ...], *, times: int = 1) -> _TracedLoss:
    structures: list[LossStructure] = []
    loss = checked_loss(node, times=times)

    def results(*given: Any) -> tuple[list[jax.Array], list[jax.Array], LossOutcome]:
        outcome = loss(*given)
        terms, metrics = merge_terms(outcome.terms), outcome.metrics.values()
        structures.append(
            LossStructure(
                counts=tuple(float(term.count) if is_static(term.count) else None for term in terms),
                separate_metrics=tuple(sorted({why for metric in metrics if (why := _why_separate(metric))})),
                has_last=any(isinstance(metric, Last) for metric in metrics),
            )
        )
        totals = [jnp.asarray(term.total) for term in terms]
        counts = [jnp.asarray(term.count) for term in terms if not is_static(term.count)]
        return totals, counts, outcome._replace(model_state=jax.tree.map(jnp.asarray, outcome.model_state))

    whole = trace_function(update_wrapper(results, node.loss, updated=()), *given)
    of_totals, of_counts, of_outcome = whole.tree.children()
    first = of_totals.num_leaves + of_counts.num_leaves
    function = replace(whole, tree=of_outcome, others=whole.others[first:])
    return _TracedLoss(function, range(of_totals.num_leaves, first), structures[0])


def _trace_in_region(
    node: DifferentiateNode, given: tuple[Any, ...], manual_axes: tuple[str, ...], times: int
) -> _TracedLoss | None:
    """Trace the loss as it runs: on one device, along the axes of the rows. So the operations can be run there.

    None if that raises: what is wrong with a loss is told of a trace under the mesh, where all axes have names.
    """
    try:
        with as_on_one_device(manual_axes):
            return _trace(node, given, times=times)
    except Exception:  # of the user's own code, whatever it is, or of jax
        return None


def _trace_under_mesh(
    node: DifferentiateNode, given: tuple[Any, ...], manual_axes: tuple[str, ...], times: int
) -> _TracedLoss:
    try:
        return _trace(node, given, times=times)
    except ValueError as error:  # rows of one device that are split once more do not divide
        found = re.search(r"to mesh ax[ei]s (.*?) \(of .* does not evenly divide", str(error))
        axes = re.findall(r"'(\w+)'", found.group(1)) if found else ()
        if not set(axes) & set(manual_axes):
            raise
        raise _names_axes_of_rows([("shard_map", tuple(axes), "")], node, manual_axes) from error


def _why_separate(metric: Metric) -> str | None:
    """Why a metric cannot be summed together with the gradient; None if it can."""
    match metric:
        case Max() | Min():
            return type(metric).__name__.lower()
        case Sum(value) | Last(value) if not jnp.issubdtype(value.dtype, jnp.floating):
            return "whole numbers"
        case _:
            return None


def _trace_gradient(
    node: DifferentiateNode, given: tuple[Any, ...], manual_axes: tuple[str, ...], times: int
) -> ClosedJaxpr:
    """The jaxpr of the gradient, where the step computes it: in a region that is manual over the axes of the rows."""

    def total(trained: Any, params: Params, model_state: Any, rows: BatchRows, keys: Any, reads: Reads) -> Any:
        params = with_frozen(trained, params, node.wrt)
        outcome = checked_loss(node, times=times)(params, model_state, rows, keys, reads)
        return sum_arrays([term.total for term in outcome.terms])

    gradient, mesh = jax.grad(total), mesh_of_step()
    if mesh is not None and manual_axes:
        gradient = on_every_device(gradient, mesh, manual_axes)
    try:
        return jax.make_jaxpr(gradient)(trained_leaves(given[0], node.wrt), *given)
    except NameError as error:
        if (refused := _refused_by_jax(error, node)) is None:
            raise
        raise refused from error


def _check_counts(needs: list[bool], params: Params, model_state: Any, node: DifferentiateNode) -> None:
    paths = [f"params/{path}".rstrip("/") for path, _ in leaves_by_path(params)]
    paths += [f"model_state/{path}".rstrip("/") for path, _ in leaves_by_path(model_state)]
    if used := [path for path, needed in zip(paths, needs, strict=False) if needed]:
        raise LossError(
            f"A count of the loss of `{node.written}` depends on the parameters, or on the model state.",
            facts=(("depends on", listed(f"`{path}`" for path in used)),),
            suggestion="Count rows or tokens: `sc.Mean(total, count)` is divided by the count, which has no gradient.",
        )


def _check_reached(traced: ClosedJaxpr, totals: range, params: Params, node: DifferentiateNode) -> None:
    """Refuse a parameter that no gradient can reach: an optimizer with weight decay would change it all the same.

    A gradient reaches what the tangents of the totals depend on: in one branch of a conditional is enough, through
    `stop_gradient` or whole numbers is not. That a gradient happens to be 0 does not matter. Tangents are traced only
    where what the operations are does not say it already: they cost as much as the loss and its gradient.
    """
    trained = {place: path for place, (path, _) in enumerate(leaves_by_path(params)) if is_trained(path, node.wrt)}
    known = surely_reached(traced.jaxpr, [place in totals for place in range(len(traced.jaxpr.outvars))])
    if all(known[place] for place in trained):
        return
    _, run = depends_on(traced, outputs=totals)
    values = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in traced.in_avals]

    def tangents_of_totals(tangents: dict[int, Any], values: list[Any]) -> list[Any]:
        def run_with(leaves: dict[int, Any]) -> list[Any]:
            return run([leaves.get(place, value) for place, value in enumerate(values)])

        return jax.jvp(run_with, ({place: values[place] for place in trained},), (tangents,))[1]

    of_tangents = jax.make_jaxpr(tangents_of_totals)({place: values[place] for place in trained}, values)
    reached, _ = depends_on(of_tangents, outputs=range(len(totals)))
    if unreached := [path for path, is_reached in zip(trained.values(), reached, strict=False) if not is_reached]:
        raise LossError(
            f"No gradient of `{node.written}` reaches {len(unreached)} of its {len(trained)} trained parameters.",
            facts=(
                ("parameters", listed(leaf_text(path, "the only one") for path in unreached)),
                ("reason", "the loss does not depend on them, or only through `stop_gradient` or whole numbers"),
                ("what for", "an optimizer with weight decay would change them silently"),
            ),
            suggestion="Give batch statistics and the like as model state (`grad(loss, model_state=True)`, "
            "`step.init(params, model_state=...)`); freeze other parameters: `grad(loss, wrt=...)`.",
        )


def surely_reached(jaxpr: Jaxpr, outputs: Sequence[bool]) -> list[bool]:
    """For each input, whether its tangent reaches one of these outputs; not in doubt."""
    reached = {var for var in compress(jaxpr.outvars, outputs) if not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        made = [var in reached for var in equation.outvars]
        if any(made):
            passed: Iterator[Any] = compress(
                equation.invars, _surely_passed(equation, made)
            )  # Any: variables, literals
            reached |= {
                var for var in passed if not isinstance(var, Literal) and jnp.issubdtype(var.aval.dtype, jnp.inexact)
            }
    return [var in reached for var in jaxpr.invars]


def _surely_passed(equation: Any, outputs: list[bool]) -> list[bool]:  # Any: a jax.extend.core.JaxprEqn
    name = equation.primitive.name
    match name:
        case "scan":
            body, (constants, carried) = equation.params["jaxpr"].jaxpr, scan_counts(equation.params)
            while True:
                inputs = surely_reached(body, outputs)
                wider = [*map(or_, outputs[:carried], inputs[constants : constants + carried]), *outputs[carried:]]
                if wider == outputs:
                    return inputs
                outputs = wider
        case "cond":
            branches = [surely_reached(branch.jaxpr, outputs) for branch in equation.params["branches"]]
            return [False, *map(any, zip(*branches, strict=True))]
        case _ if name in DIFFERENTIABLE:
            return [True] * len(equation.invars)
        case _:
            inner = _same_function(equation)
            # A derivative of the user's own may be zero.
            if inner is None or (name.startswith("custom") and not is_of_jax(inner)):
                return [False] * len(equation.invars)
            return surely_reached(inner, outputs)


def _names_axes_of_rows(named: list[NamedAxes], node: DifferentiateNode, manual_axes: tuple[str, ...]) -> ShardingError:
    taken = [(what, axis, line) for what, axes, line in named for axis in axes if axis in manual_axes]
    faults = [f"`{what}` names the axis {axis!r}{line and f' ({line})'}." for what, axis, line in dict.fromkeys(taken)]
    axes = " and ".join(sorted({repr(axis) for _, axis, _ in taken}))
    what = faults_in_one(faults, of=f"the loss of `{node.written}`")
    return ShardingError(
        f"The loss of `{node.written}`: {what}" if len(faults) == 1 else what,
        facts=(("reason", f"rows are split over {axes}, and the loss is called with the rows of one device"),),
        suggestion=f"Leave {axes} out there, or write `shard(dp(...), mode='auto')`, which leaves the axis to XLA.",
    )


def _check_regions(traced: ClosedJaxpr, node: DifferentiateNode, manual_axes: tuple[str, ...]) -> None:
    """Refuse what jax runs where all axes are manual, or none, and not in between.

    Errors: ShardingError.
    """
    mesh = mesh_of_step()
    automatic = frozenset(mesh.axis_names if mesh else ()) - set(manual_axes)
    found = [
        f"`{equation.primitive.name}` runs where all axes of the mesh are manual, or all are automatic"
        f"{(line := user_line(equation)) and f' ({line})'}."
        for equation in _equations(traced.jaxpr, outside_of=automatic)
        if equation.primitive.name in WITHOUT_PARTLY_MANUAL_REGIONS
    ]
    if not automatic or not found:
        return
    axes = [" and ".join(map(repr, sorted(names))) for names in (manual_axes, automatic)]
    what = faults_in_one(list(dict.fromkeys(found)), of=f"the loss of `{node.written}`")
    specs = "in_specs=..., out_specs=..., check_vma=False"
    raise ShardingError(
        what if what[0].isdigit() else f"The loss of `{node.written}`: {what}",
        facts=(("manual", f"{axes[0]}, over which rows are split"), ("automatic", axes[1])),
        suggestion=f"Either call it in a `jax.shard_map(..., {specs})`, which makes {axes[1]} manual too, or write "
        "`shard(dp(...), mode='auto')`.",
    )


def keys_of(node: DifferentiateNode, key: Any, numbers: Any) -> Any:  # Any: typed keys, or their shapes
    """The keys that the loss is given for rows with these positions in the batch; None if it takes none."""
    if node.rng is None:
        return None
    if isinstance(numbers, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda key, numbers: keys_of(node, key, numbers), key, numbers)
    if node.rng == "example":
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    return jax.random.fold_in(key, numbers[0])


def num_rows(rows: BatchRows) -> int:
    """The number of rows of a local microbatch."""
    return jax.tree.leaves(rows)[0].shape[0]


def _check_arguments(node: DifferentiateNode) -> None:
    """Refuse a function that does not take what its options pass by position."""
    who, define = ("loss", "loss") if node.head is None else ("encoder", "encode")
    try:
        parameters = list(inspect.signature(node.loss).parameters.values())
    except (TypeError, ValueError):  # it has no signature to look at
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_name = {one.name for one in parameters if one.kind is not inspect.Parameter.POSITIONAL_ONLY}
    takes_any_name = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    if missing := [name for name in node.reads if name not in by_name and not takes_any_name]:
        raise LossError(
            f"The {who} of `{node.written}` does not take what it reads.",
            facts=(("read", listed(node.reads)), ("missing", listed(missing))),
            suggestion=f"Write `def {define}(params, rows, *, {', '.join(node.reads)})`.",
        )
    by_keyword = [one for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]
    required = [one.name for one in by_keyword if one.default is inspect.Parameter.empty]
    if unread := [name for name in required if name not in node.reads]:
        names = [f'"{name}"' for name in (*node.reads, *unread)]
        reads = names[0] if len(names) == 1 else f"({', '.join(names)})"
        raise LossError(
            f"The {who} of `{node.written}` takes by keyword what it is not given.",
            facts=(("given", listed(node.reads) or "nothing"), ("missing", listed(unread))),
            suggestion=f"Either write `grad(loss, reads={reads})`, if the state has it, or bind it by "
            "`functools.partial`.",
        )
    taken = [one for one in parameters if one.kind in kinds and one.name not in node.reads]
    needed = sum(one.default is inspect.Parameter.empty for one in taken)
    keys = () if node.rng is None else ("keys",) if node.rng == "example" else ("key",)
    passed = ("params", "rows", *keys, *(("model_state",) if node.model_state is not None else ()))
    takes_any = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
    if needed <= len(passed) and (takes_any or len(passed) <= len(taken)):
        return
    suggestion = f"Write `def {define}({', '.join(passed)})`."
    if needed > len(passed) == 2:
        suggestion = (
            'Either write `grad(loss, rng="example")`, if the third is one key per row, or '
            "`grad(loss, model_state=True)`, if it is the model's own state, or `x, y = rows` in the loss, if it is a "
            "part of the batch, or bind it by `functools.partial`."
        )
    facts = (("passed", ", ".join(passed)), ("taken", ", ".join(one.name for one in taken) or "nothing"))
    raise LossError(f"The {who} of `{node.written}` takes other arguments.", facts=facts, suggestion=suggestion)


def _check_head_arguments(node: DifferentiateNode) -> None:
    """Refuse a head that does not take the parameters and z by position."""
    try:
        signature = inspect.signature(node.head)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):  # it has no signature to look at
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        taken = ", ".join(signature.parameters) or "nothing"
        raise LossError(
            f"The head of `{node.written}` takes other arguments.",
            facts=(("passed", "params, z"), ("taken", taken)),
            suggestion="Write `def head(params, z)`; what the encoder is given besides, it can hand on in z.",
        ) from error


def _check_returned(returned: Any, node: DifferentiateNode) -> None:
    wanted = ("value", *(("metrics",) if node.has_aux else ()), *(() if node.model_state is None else ("model_state",)))
    if len(wanted) > 1 and not (isinstance(returned, tuple) and len(returned) == len(wanted)):
        got = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else described(returned)
        facts = (("expected", f"a tuple ({', '.join(wanted)})"), ("got", got))
        remedy = None
        if (
            isinstance(returned, tuple)
            and wanted == ("value", "model_state")
            and len(returned) == 3
            and node.head is None
        ):
            remedy = "Write `grad(loss, has_aux=True, ...)` for a loss that returns (value, metrics, model_state)."
        what = f"The {_returning(node)} of `{node.written}` does not return what its options ask for."
        raise LossError(what, facts=facts, suggestion=remedy)
    value = returned[0] if len(wanted) > 1 else returned
    for term in value.terms if isinstance(value, AbstractTerms) else (value,):
        _check_value(term, node)
    if node.has_aux:
        _check_metrics(returned[1], node)


def _check_value(value: Any, node: DifferentiateNode) -> None:
    total = value.total if isinstance(value, Mean) else value
    what = f"The {_returning(node)} of `{node.written}` does not return a scalar"
    mean = ", a mean over the rows" if node.head is None else ""
    facts = (("expected", f"a floating-point scalar{mean}"), ("got", described(value)))
    if isinstance(value, Mean):
        what = f"The {_returning(node)} of `{node.written}` returns a `Mean` whose total and count are not both scalars"
        facts = (("expected", "a floating-point total, a sum over the rows, and a count"), ("got", described(value)))
        if not _is_scalar(value.count):
            raise LossError(f"{what}.", facts=facts, suggestion="Write `.sum()` over the rows.")
    if not isinstance(total, ARRAY_LIKE):
        remedy = None
        match value:
            case (_, dict(metrics)) if not node.has_aux and all(map(_is_scalar, jax.tree.leaves(metrics))):
                remedy = "Write `grad(loss, has_aux=True)` for a loss that returns (value, metrics)."
            case _:
                pass
        raise LossError(f"{what}.", facts=facts, suggestion=remedy)
    if jnp.shape(total) != ():
        remedy = "Write `.sum()` over the rows." if isinstance(value, Mean) else "Write `.mean()` over the rows."
        raise LossError(f"{what}.", facts=facts, suggestion=remedy)
    if not jnp.issubdtype(jnp.result_type(total), jnp.floating):
        raise LossError(f"{what} that has a gradient.", facts=facts)


def _check_metrics(metrics: Any, node: DifferentiateNode) -> None:
    if not isinstance(metrics, dict):
        facts = (("expected", "a dict of arrays by name"), ("got", described(metrics)))
        raise LossError(f"The metrics of `{node.written}` are not a dict.", facts=facts)
    faults = [
        f"the name `{name!r}` is {described(name)}; a metric is named by a string."
        for name in metrics
        if not isinstance(name, str)
    ]
    taken = [name for name in metrics if name in RESERVED]
    faults += [f"`{name}` is the name of a metric that the step itself reports." for name in taken]
    for name, metric in metrics.items():
        numbers = jax.tree.leaves(metric) if isinstance(metric, Metric) else [metric]
        faults += [
            f"`{name}` is {described(number)}; a metric is an array, or sc.Mean, Sum, Max, Min, Last of one."
            for number in numbers
            if not isinstance(number, ARRAY_LIKE)
        ]
        faults += [
            f"`{name}` divides {described(term.total)} by {described(term.count)}; a count is a scalar or like it."
            for term in (metric.terms if isinstance(metric, AbstractTerms) else ())
            if jnp.shape(term.count) not in ((), jnp.shape(term.total))
        ]
    if faults:
        what = faults_in_one(faults, of=f"the metrics of `{node.written}`")
        raise LossError(what[:1].upper() + what[1:])


def _returning(node: DifferentiateNode) -> str:
    """What returns the value: the loss, or the head of what it encodes."""
    return "loss" if node.head is None else "head"


def _check_model_state(before: Any, after: Any, node: DifferentiateNode) -> None:  # Any: trees of the user's
    old, new = (dict(leaves_by_path(one)) for one in (before, after))
    faults = [f"`model_state/{path}` is not returned." for path in old if path not in new]
    faults += [f"`model_state/{path}` was not given." for path in new if path not in old]
    for path in old.keys() & new.keys():
        if described(old[path]) != described(new[path]):
            faults.append(
                f"`model_state/{path}` goes in as {described(old[path])} and comes out as {described(new[path])}."
            )
    if faults or jax.tree.structure(before) != jax.tree.structure(after):
        what = faults_in_one(sorted(faults) or ["its tree structure changes."], of="the model state")
        raise LossError(f"The loss of `{node.written}` must return a model state like the one it takes: {what}")


def _rows_of_model_state(
    node: DifferentiateNode, model_state: Any, whole: WholeBatch, num_rows: int
) -> Any:  # Any: shapes; the model's own tree
    """The shapes of the model state that one call is given. Errors: LossError for "rows" that are not the batch's."""
    rules = iter(rules_by_leaf(node.model_state or (), model_state))
    faults: list[str] = []

    def local(path: str, leaf: Any) -> Any:
        if next(rules) != "rows":
            return leaf
        if leaf.shape[0] != whole.num_rows:
            faults.append(
                f'`model_state/{path}` is {describe_leaf(leaf)}, with the rule "rows", and the batch has '
                f"{whole.num_rows} rows."
            )
        return jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype)

    leaves = [local(path, leaf) for path, leaf in leaves_by_path(model_state)]
    if faults:
        what = faults_in_one(faults, of="the model state")
        raise LossError(f"`{node.written}`: {what}")
    return jax.tree.structure(model_state).unflatten(leaves)


def _check_sizes(node: DifferentiateNode, given: tuple[Any, Any, Any, Any], reads: Reads, whole: WholeBatch) -> None:
    """Refuse a leaf without a rule that has the rows of the batch, or of one call: it would be handed to other rows.

    A leaf whose size is theirs by accident, as of 64 channels, works with any number of rows.
    Errors: LossError.
    """
    params, model_state, rows, keys = given
    sizes = (num_rows(rows), whole.num_rows)
    like_rows = [
        (path, leaf)
        for path, leaf in leaves_by_path(model_state)
        if leaf.ndim and leaf.shape[0] in sizes and explicit_rule(node.model_state or (), path) is None
    ]

    def with_rows(times: int, tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] * times, *leaf.shape[1:]), leaf.dtype), tree
        )

    call = checked_loss(node) if node.head is None else checked_encoder(node)

    @cache
    def is_accepted(times: int) -> bool:
        more = with_rows(times, keys) if node.rng == "example" else keys
        leaves, tree = jax.tree.flatten(model_state)
        by_rule = zip(rules_by_leaf(node.model_state or (), model_state), leaves, strict=True)
        state = tree.unflatten([with_rows(times, leaf) if rule == "rows" else leaf for rule, leaf in by_rule])
        try:
            jax.eval_shape(call, params, state, with_rows(times, rows), more, reads)
        except Exception:  # whatever the user's own code raises for a leaf of the wrong size
            return False
        return True

    # A loss that does not take as many rows as the leaf has is refused as it is traced, for its own reason.
    like_rows = [
        (path, leaf)
        for path, leaf in like_rows
        if is_accepted(leaf.shape[0] // sizes[0]) and not is_accepted(2 * leaf.shape[0] // sizes[0])
    ]
    if not like_rows:
        return
    listed = [f"`model_state/{path}` is {describe_leaf(leaf)}." for path, leaf in like_rows]
    what = faults_in_one(listed, of="the model state")
    example = like_rows[0][0]
    raise LossError(
        f"`{node.written}`: the model state seems to have rows, and no rule says so: {what}",
        facts=(
            ("rows", f"{whole.num_rows} of the batch, {sizes[0]} of one call of the loss"),
            ("reason", "a hidden state of one row may not be handed to another, or be averaged"),
        ),
        suggestion=f"Give it the {whole.num_rows} rows of the batch and write "
        f'`model_state={{"{example}": "rows"}}`; or write "sequential" if its size is no number of rows.',
    )


def _model_state_leaves(
    node: DifferentiateNode, traced: ClosedJaxpr, given: tuple[Any, Any, Any, Any], whole: WholeBatch
) -> tuple[ModelStateLeaf, ...]:
    """Each leaf of the model state, its rule, and how it is reduced.

    Errors: LossError with every leaf whose rule does not fit what the loss does to it.
    """
    params, model_state, rows, keys = given
    rules, paths = rules_by_leaf(node.model_state or (), model_state), [path for path, _ in leaves_by_path(model_state)]
    leaves, first = jax.tree.leaves(model_state), len(jax.tree.leaves(params))
    inputs = [False] * first + [rule in ("rows", "key") for rule in rules]
    inputs += [True] * len(jax.tree.leaves((rows, keys)))
    inputs += [False] * (len(traced.jaxpr.invars) - len(inputs))  # what is read of the state
    # What one microbatch hands on, the next one starts from: to be repeated until nothing is added.
    while True:
        varies = varying(traced.jaxpr, inputs)[-len(leaves) :] if leaves else []
        varies = [one or is_overwritten(path) for path, one in zip(paths, varies, strict=True)]
        more = [rule == "sequential" and one for rule, one in zip(rules, varies, strict=True)]
        wider = [*inputs[:first], *map(or_, inputs[first : first + len(leaves)], more), *inputs[first + len(leaves) :]]
        if wider == inputs:
            break
        inputs = wider
    passed = passed_on(traced.jaxpr)[-len(leaves) :] if leaves else []
    faults: list[str] = []
    for place, (path, leaf, rule) in enumerate(zip(paths, leaves, rules, strict=True)):
        is_whole = not jnp.issubdtype(leaf.dtype, jnp.floating)
        if is_overwritten(path) and passed[place] != first + place:
            faults.append(f"`model_state/{path}` is assigned its gradient, and the loss returns another value.")
        elif rule == "constant" and passed[place] != first + place:
            faults.append(f'`model_state/{path}` has the rule "constant", and the loss returns another value.')
        elif rule == "sequential" and is_whole and varies[place] and whole.side_by_side is not None:
            faults.append(
                f"`model_state/{path}` ({describe_leaf(leaf)}) depends on the rows, and has no mean: "
                f"give it a rule, "
                + ('`"max"`.' if leaf.dtype == bool else '`"sum"` for a counter, `"max"` or `"rows"`.')
            )
        elif rule == "sum" and not _reads(traced, len(traced.jaxpr.outvars) - len(leaves) + place, first + place):
            faults.append(
                f'`model_state/{path}` has the rule "sum", and the loss returns a value that does not depend on it: '
                f"return what it was, plus what is added."
            )
    if faults:
        what = faults_in_one(faults, of="the model state")
        raise LossError(f"`{node.written}`: {what}")
    return tuple(
        ModelStateLeaf(path, rule, _reduction(rule, leaf.dtype) if one or rule == "sum" else None)
        for path, rule, leaf, one in zip(paths, rules, leaves, varies, strict=True)
    )


def _reads(traced: ClosedJaxpr, output: int, place: int) -> bool:
    """Whether an output depends on the input at a place."""
    return depends_on(traced, outputs=[output])[0][place]


def _reduction(rule: str, dtype: Any) -> str | None:  # Any: a dtype of numpy
    """How a leaf with this rule is reduced over a mesh axis, as plans print it."""
    match rule:
        case "sequential" | "average":
            return f"mean in {accumulation_dtype(dtype)}"
        case "max":
            return f"max in {dtype}"
        case "sum":
            is_floating = jnp.issubdtype(dtype, jnp.floating)
            return f"sum in {accumulation_dtype(dtype)}" if is_floating else "sum in int32, byte by byte"
        case _:
            return None


def varying(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """For each output, whether it may depend on one of these inputs; in doubt it does."""
    known = dict(zip(map(id, jaxpr.invars), inputs, strict=True))
    for equation in jaxpr.eqns:
        given = [known.get(id(var), False) for var in equation.invars]
        for var, one in zip(equation.outvars, _varying_results(equation, given), strict=True):
            known[id(var)] = one
    return [known.get(id(var), False) for var in jaxpr.outvars]


def _varying_results(equation: Any, given: list[bool]) -> list[bool]:  # Any: a jax.extend.core.JaxprEqn
    if not any(given):
        return [False] * len(equation.outvars)
    match equation.primitive.name:
        case "scan":
            body, (constants, carried) = equation.params["jaxpr"].jaxpr, scan_counts(equation.params)
            while True:
                made = varying(body, given)
                old = given[constants : constants + carried]
                new = list(map(or_, old, made[:carried]))
                if new == old:
                    return made
                given = [*given[:constants], *new, *given[constants + carried :]]
        case "cond" if not given[0]:
            branches = [varying(branch.jaxpr, given[1:]) for branch in equation.params["branches"]]
            return [any(each) for each in zip(*branches, strict=True)]
        case _:
            inner = _same_function(equation)
            return [True] * len(equation.outvars) if inner is None else varying(inner, given)


def passed_on(jaxpr: Jaxpr) -> list[int | None]:
    """For each output, the position of the input that it is, unchanged; None if it is none."""
    known: dict[int, int] = {id(var): place for place, var in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        inner = _same_function(equation)
        if inner is None:
            continue
        for var, place in zip(equation.outvars, passed_on(inner), strict=True):
            source = None if place is None else known.get(id(equation.invars[place]))
            if source is not None:
                known[id(var)] = source
    return [known.get(id(var)) for var in jaxpr.outvars]


def _same_function(equation: Any) -> Jaxpr | None:  # Any: a jax.extend.core.JaxprEqn
    """The jaxpr that an equation calls with its own inputs and outputs; None for any other equation."""
    if equation.primitive.name not in CALLS:
        return None
    parts = [part.jaxpr if isinstance(part, ClosedJaxpr) else part for part in equation.params.values()]
    arity = (len(equation.invars), len(equation.outvars))
    return next((one for one in parts if isinstance(one, Jaxpr) and (len(one.invars), len(one.outvars)) == arity), None)


def _check_keys(key: Any, node: DifferentiateNode) -> None:
    names: list[str] = []
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), key)
    if (name := names[0]) not in BATCH_STABLE:
        facts = (
            ("implementation", name),
            ("reason", "under vmap, what one key draws depends on the number of keys"),
            ("stable", ", ".join(BATCH_STABLE)),
        )
        raise LossError(
            f"`{node.written}` asks for one key per row, which this key implementation cannot give.",
            facts=facts,
            suggestion='Give `init` a number as its seed, or write `rng="microbatch"`.',
        )


_NO_MESH = (
    r"context mesh cannot be empty|requires a non-empty mesh in context|match the specs of the input|to Auto axes"
)
_EXPLICIT = (
    r"passed to (\w+) cannot contain axis names that are of type Auto or Manual\. Got PartitionSpec: (.*) with axis"
)


def _refused_by_jax(error: Exception, node: DifferentiateNode) -> StepcError | None:
    """What jax refuses because a step has a mesh of its own, in the user's words; None for any other error.

    jax has no classes for these errors, only texts. A text that it changes passes through, with a note.
    """
    said, loss = str(error), f"The loss of `{node.written}`"
    match error:
        case NameError() if found := re.search(r"unbound axis name: (\w+)", said):
            return LossError(
                f"{loss} names the mesh axis {found.group(1)!r}.",
                facts=(("reason", "a loss is a function of the rows it is given, and its reference has no mesh"),),
                suggestion="Return the mean over those rows; `shard` averages over the axis.",
            )
        case ValueError() if found := re.search(_EXPLICIT, said):
            function, spec = found.group(1), found.group(2).replace(",)", ")")
            return ShardingError(
                f"{loss} asks `{function}` for a result that is sharded as {spec}, as code for Explicit axes does.",
                facts=(("reason", "in a step the axes of the model are Auto, whatever they are in the user's mesh"),),
                suggestion=f"Either write `jax.lax.with_sharding_constraint(..., {spec})` around it, or wrap that code "
                "in `jax.sharding.explicit_axes`.",
            )
        case ValueError() if "should match the aval mesh" in said:
            return ShardingError(
                f"{loss} puts an array on the Explicit axes of a mesh.",
                facts=(("reason", "in a step the axes of the model are Auto, whatever they are in the user's mesh"),),
                suggestion="Write `jax.lax.with_sharding_constraint(x, P(...))` in the place of `jax.device_put`, and "
                "leave out the `in_shardings` and `out_shardings` of a `jax.jit` in it.",
            )
        case ValueError() if "should match the mesh passed to" in said:  # a jax that does not ask for that of a step
            what = f"{loss} passes a mesh to `shard_map`, and this jax takes only that of the context there."
            return ShardingError(what, suggestion="Leave `mesh=` out: `jax.shard_map` takes that of the context.")
        case ValueError() if "`set_mesh` can only be used outside" in said:
            what = f"{loss} sets a mesh, and already runs under the mesh of the step."
            return ShardingError(what, suggestion="Leave `jax.set_mesh` out.")
        case NotImplementedError() if "Going from `Manual` AxisType" in said:
            what = f"{loss} makes axes Auto or Explicit, and one of them shards the rows."
            return ShardingError(what, suggestion='Name the others alone: `auto_axes(..., axes=("model",))`.')
        case ValueError() if mesh_of_step() is None and re.search(_NO_MESH, said):
            what = f"{loss} names axes of a mesh, and `compile` was given none."
            return ShardingError(what, suggestion="Write `compile(pipeline, mesh=mesh)`.")
        case _:
            return None


def _add_note(error: Exception, node: DifferentiateNode, rows: BatchRows) -> None:
    shapes = listed(f"{path or 'rows'} {described(leaf)}" for path, leaf in leaves_by_path(rows))
    who = "loss" if node.head is None else "encoder"
    error.add_note(f"stepc: raised by the {who} of `{node.written}` while it was traced for one microbatch: {shapes}")
    for hint in _hints_of_nnx(error):
        error.add_note(f"stepc: {hint}")


def _hints_of_nnx(error: Exception) -> Iterator[str]:
    """What to write where a loss treats parameters as a module of Flax NNX does not allow."""
    if type(error).__name__ == "TraceContextError":
        yield (
            "what a module of Flax NNX changes while it is called, such as batch statistics and keys of dropout, is "
            "model state: write `grad(loss, model_state=True)`, take it as the last argument and return it."
        )
    if str(error) == "'State' object is not callable":
        yield "the loss is given parameters, not a module: call `nnx.merge(graphdef, params, rest)`."


def described(value: Any) -> str:
    """The dtype and shape of an array, the type of anything else."""
    if isinstance(value, Mean):
        return f"Mean({described(value.total)}, {described(value.count)})"
    return describe_leaf(value)


def _is_scalar(number: Any) -> bool:
    return isinstance(number, ARRAY_LIKE) and jnp.shape(number) == ()


def depends_on(
    traced: ClosedJaxpr, *, outputs: Iterable[int]
) -> tuple[list[bool], Callable[[Sequence[Any]], list[Any]]]:
    """For each input, whether any of these outputs depends on it; and a function that computes these outputs alone.

    Args:
      traced: what `jax.make_jaxpr` returned.
      outputs: their positions.
    The function takes all inputs, as a flat list, and runs only what the outputs depend on: dead code is eliminated,
    inside loops and branches too. Where this jax cannot do that, an input counts as needed when in doubt.
    """
    positions = set(outputs)
    is_wanted = [position in positions for position in range(len(traced.jaxpr.outvars))]
    if dce_jaxpr is None:
        run = jaxpr_as_fun(traced)
        return _needed_inputs(traced, is_wanted), lambda inputs: list(compress(run(*inputs), is_wanted))
    jaxpr, is_needed = dce_jaxpr(_without_effects(traced.jaxpr), is_wanted)
    run_needed = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))
    return is_needed, lambda inputs: run_needed(*compress(inputs, is_needed))


def named_axes(traced: ClosedJaxpr) -> Iterator[NamedAxes]:
    """What names a mesh in a jaxpr: every sharding constraint, every `shard_map`, every collective in one.

    A `shard_map` names the axes of its specs. That it is manual over others, as over all without `axis_names=`, does
    nothing along them.
    """
    for equation in _equations(traced.jaxpr):
        params, name = equation.params, equation.primitive.name
        match name:
            case "sharding_constraint":
                yield "with_sharding_constraint", tuple(_axes_of_specs([params["sharding"].spec])), user_line(equation)
            case "shard_map":
                specs = (*params["in_specs"], *params["out_specs"])
                yield name, tuple(sorted(set(_axes_of_specs(specs)))), user_line(equation)
            case "reshard" | "jit" | "device_put":
                places = params.get("in_shardings", ()) + params.get("out_shardings", ()) + params.get("devices", ())
                specs = [one.spec for one in (*places, params.get("dst_sharding")) if isinstance(one, NamedSharding)]
                if specs:
                    yield name, tuple(sorted(set(_axes_of_specs(specs)))), user_line(equation)
            case "pvary" | "pcast" | "pbroadcast":
                pass  # they move nothing
            case _:
                axes = params.get("axes", params.get("axis_name", ()))
                by_name = [axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(axis, str)]
                if by_name:
                    yield name.removesuffix("_invariant"), tuple(by_name), user_line(equation)


def _axes_of_specs(specs: Iterable[Iterable[Any]]) -> Iterator[str]:  # Any: entries of a PartitionSpec
    for entry in chain.from_iterable(specs):
        yield from (axis for axis in (entry if isinstance(entry, tuple) else (entry,)) if isinstance(axis, str))


def _equations(jaxpr: Jaxpr, *, outside_of: frozenset[str] | None = None) -> Iterator[Any]:
    # Any: a jax.extend.core.JaxprEqn
    """Every equation, also of jaxprs in it; `outside_of` leaves out what is in a `shard_map` over all of these axes."""
    for equation in jaxpr.eqns:
        yield equation
        left = outside_of
        if left is not None and equation.primitive.name == "shard_map":
            left -= equation.params["newly_manual_axes"]
            if not left:
                continue
        for inner in programs_in(equation):
            yield from _equations(inner, outside_of=left)


def _without_effects(jaxpr: Jaxpr) -> Jaxpr:
    """Without the equations that only print or report: they would count as needed, and so would all their inputs."""
    equations = []
    for equation in jaxpr.eqns:
        if equation.outvars or not equation.effects:
            params = {name: _part_without_effects(part) for name, part in equation.params.items()}
            equations.append(equation.replace(params=params, effects=set()) if equation.effects else equation)
    return jaxpr.replace(eqns=equations, effects=set())


def _part_without_effects(part: Any) -> Any:
    match part:
        case Jaxpr():
            return _without_effects(part)
        case ClosedJaxpr():
            return ClosedJaxpr(_without_effects(part.jaxpr), part.consts)
        case tuple() | list():
            return type(part)(map(_part_without_effects, part)) if type(part) in (tuple, list) else part
        case _:
            return part


def _needed_inputs(traced: ClosedJaxpr, is_wanted: Sequence[bool]) -> list[bool]:
    """As `dce_jaxpr` finds them, but an equation that makes one needed result needs all of its inputs."""
    needed = {id(var) for var in compress(traced.jaxpr.outvars, is_wanted)}
    for equation in reversed(traced.jaxpr.eqns):
        if any(id(var) in needed for var in equation.outvars):
            needed |= {id(var) for var in equation.invars}
    return [id(var) in needed for var in traced.jaxpr.invars]
