"""The naive evaluator of core programs, by loops over nodes. It shares no control flow with the reference.

The reference slices batches. The evaluator never does: it passes on the *numbers* of rows, and takes the rows from the
whole batch only where the loss is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepc._core.nodes import (
    AlternateNode,
    DifferentiateNode,
    FollowNode,
    GuardNode,
    InScan,
    MapNode,
    MeanNode,
    OverMesh,
    PerturbNode,
    Program,
    RepeatNode,
    RescaleNode,
    ScaleNode,
    Turn,
    UnderVmap,
    UpdateNode,
    named,
    slot_name,
)
from stepc._language.encoded import Encoded, EncodedTree, is_floating, take_apart
from stepc._language.model_state import ADVANCE, fold_key, overwrite, overwritten_leaves, rules_by_leaf
from stepc._language.optimizers import WHOLE_BATCH_LOSSES, run_optimizer
from stepc._language.semantics import draw_tag, narrowed
from stepc._language.state import same_tree, trained_leaves, with_frozen
from stepc._language.terms import (
    LossOutcome,
    Mean,
    Metric,
    Sums,
    accumulation_dtype,
    combine_metrics,
    divide_by_count,
    loss_outcome,
    metric_value,
    power_of_two,
    squares_of,
    sum_arrays,
    sum_of_squares,
)

Tree: TypeAlias = Any  # any pytree of arrays


@dataclass(frozen=True)
class EvaluationState:
    """Everything that a program reads and changes, besides the batch.

    Args:
      step: the number of steps made.
      rng: a typed key.
      model_state: the model's own state, if the loss has one.
      slots: what the nodes of a program keep, by the names that `named` gives them.
    """

    params: Tree
    opt_state: Tree
    step: Any = 0  # Any: a number, or an array
    rng: Any = None  # Any: a typed key
    model_state: Tree = None
    slots: dict[str, Any] = field(default_factory=dict)  # Any: by node


@dataclass(frozen=True)
class _Call:
    """One call of the loss: its rows, and the leaves of the model state before and after it."""

    rows: np.ndarray
    before: list[Any]  # Any: arrays
    after: list[Any]  # Any: arrays


@dataclass(frozen=True)
class _SummedGradient:
    """A gradient before division: for each term the sum of its gradients and of its counts; the metrics likewise."""

    terms: tuple[tuple[Tree, Any], ...]  # Any: a number, or an array
    metrics: dict[str, Metric]
    model_state: Tree
    calls: tuple["_Call", ...] = ()
    # Of a loss of the whole batch: the gradient and the metrics of all these calls; and what is linear after it.
    whole: Callable[[tuple["_Call", ...]], "_SummedGradient"] | None = None
    then: tuple[Any, ...] = ()  # Any: functions of a leaf

    def complete(self) -> "_SummedGradient":
        """The same, where no more calls follow: a loss of the whole batch is computed."""
        if self.whole is None:
            return self
        found = self.whole(self.calls)
        for function in self.then:
            found = found.linear(function)
        return replace(self, terms=found.terms, metrics={**found.metrics, **self.metrics}, whole=None, then=())

    def value(self) -> Tree:
        """Every term divided by its count, and added up, in float32 at least."""
        terms = self.complete().terms
        means = [jax.tree.map(lambda leaf, count=count: divide_by_count(leaf, count), total) for total, count in terms]
        return jax.tree.map(lambda *terms: sum_arrays(terms), *means)

    def reported(self) -> dict[str, Any]:  # Any: arrays
        """The metrics, as numbers."""
        return {name: metric_value(metric) for name, metric in self.complete().metrics.items()}

    def linear(self, function: Any) -> "_SummedGradient":  # Any: of a leaf
        """The function of every leaf of every sum."""
        if self.whole is not None:
            return replace(self, then=(*self.then, function))
        return replace(self, terms=tuple((jax.tree.map(function, total), count) for total, count in self.terms))


def evaluate(program: Program, state: EvaluationState, batch: Tree) -> tuple[EvaluationState, dict[str, Any]]:
    """One dispatch of a whole program: the state after it, and the metrics."""
    match program:
        case (RepeatNode(size, minibatches), *rest):
            each, start = [], state
            for j in range(size):
                taken = j if minibatches is None else _shuffled(start, batch, *divmod(j, minibatches), minibatches)
                state, metrics = _one_step(
                    tuple(rest), state, jax.tree.map(lambda leaf, taken=taken: leaf[taken], batch)
                )
                each.append(metrics)
            return state, jax.tree.map(lambda *values: jnp.stack(values), *each)
        case _:
            return _one_step(program, state, batch)


def _shuffled(state: EvaluationState, batch: Tree, epoch: int, number: int, parts: int) -> np.ndarray:
    """The rows of one minibatch of an epoch. It permutes all rows for each: slow, and nothing is kept."""
    num_rows = len(jax.tree.leaves(batch)[0])
    order = np.asarray(jax.random.permutation(_key(state, draw_tag("epochs"), epoch), num_rows))
    return order[number * num_rows // parts : (number + 1) * num_rows // parts]


def gradient(program: Program, state: EvaluationState, batch: Tree) -> tuple[Tree, dict[str, Any]]:
    """The gradient that a program without an update computes from a batch, and its metrics."""
    summed = _gradient_of_rows(program, state, batch, np.arange(len(jax.tree.leaves(batch)[0])))
    return summed.value(), summed.reported()


def _one_step(program: Program, state: EvaluationState, batch: Tree) -> tuple[EvaluationState, dict[str, Any]]:
    match program:
        case (*outer, AlternateNode(turns)):
            return _all_turns(tuple(outer), turns, state, batch)
        case _:
            return _one_update(program, state, batch)[:2]


def _all_turns(
    outer: Program, turns: tuple[Turn, ...], before: EvaluationState, batch: Tree
) -> tuple[EvaluationState, dict[str, Any]]:
    """The turns by their numbers; what is not made is evaluated too, for the names of its metrics, and dropped."""
    names = {id(node): name for name, node in named(outer).items()}
    state, metrics, is_finite, losses = before, {}, True, [jnp.float32(0)]
    number = before.step + 1
    for turn in turns:
        own = {name: slot for name, slot in state.slots.items() if name.startswith(f"{turn.name}/")}
        common = {name: slot for name, slot in state.slots.items() if "/" not in name}
        slots = {**common, **{name.partition("/")[2]: slot for name, slot in own.items()}}
        key = jax.random.fold_in(before.rng, draw_tag(turn.name))
        view = replace(state, opt_state=state.opt_state[turn.name], step=before.step, rng=key, slots=slots)
        after, found, finite = _one_update(turn.program, view, batch)
        if number % turn.every:
            found = {name: value * jnp.nan if value.dtype.kind == "f" else value * 0 for name, value in found.items()}
        else:
            is_finite = is_finite and all(finite)
            losses.append(found["loss"])
            state = replace(
                state,
                params=after.params,
                opt_state={**state.opt_state, turn.name: after.opt_state},
                model_state=after.model_state if turn.loss.model_state is not None else state.model_state,
                slots={**state.slots, **{name: after.slots[name.partition("/")[2]] for name in own}},
            )
        metrics |= {f"{turn.name}/{name}": value for name, value in found.items()}
    metrics = {"loss": sum(losses[1:], losses[0]), **metrics}
    slots = dict(state.slots)
    patterns = tuple(pattern for turn in turns for pattern in turn.loss.wrt)
    for node in outer:
        if isinstance(node, FollowNode):
            trained = trained_leaves(state.params, patterns)
            slots[names[id(node)]] = node.advance(slots[names[id(node)]], trained, number, *node.arguments)
    after = replace(state, step=number, slots=slots)
    for node in outer:
        if isinstance(node, GuardNode):
            name, count = names[id(node)], 0 if is_finite else 1
            scales = {
                slot_name(turn.name, scale): state.slots[slot_name(turn.name, scale)]
                for turn in turns
                for scale, one in named(turn.program).items()
                if isinstance(one, RescaleNode)
            }
            after = after if is_finite else replace(before, slots={**before.slots, **scales})
            total, consecutive = before.slots[name]
            counts = type(before.slots[name])(total + count, (consecutive + count) * count)
            after = replace(after, slots={**after.slots, name: counts})
            metrics["skipped"] = jnp.asarray(count, jnp.int32)
    return after, metrics


def _one_update(
    program: Program, state: EvaluationState, batch: Tree
) -> tuple[EvaluationState, dict[str, Any], tuple[bool, bool]]:
    """A step of one optimizer, and whether its loss and its gradient are finite."""
    names = {id(node): name for name, node in named(program).items()}
    place, update = next((n, node) for n, node in enumerate(program) if isinstance(node, UpdateNode))
    outer, inner, before = program[:place], program[place + 1 :], state
    guards = [node for node in outer if isinstance(node, GuardNode)]
    scales = [node for node in inner if isinstance(node, RescaleNode)]
    summed = _gradient_of_rows(inner, state, batch, np.arange(len(jax.tree.leaves(batch)[0]))).complete()
    trained = _trained(inner, state)
    grads, metrics = narrowed(summed.value(), trained), summed.reported()
    squares = sum_arrays([sum_of_squares(leaf) for leaf in jax.tree.leaves(grads)])
    model_state, fits = _next_model_state(inner[-1], state.model_state, summed)
    if not fits:
        metrics["loss"] = jnp.full_like(metrics["loss"], jnp.nan)
    finite = bool(jnp.isfinite(metrics["loss"])), bool(jnp.isfinite(squares))
    happens = all(finite) if guards else finite[1] or not scales
    slots = dict(state.slots)
    for node in scales:
        name = names[id(node)]
        metrics[name] = jax.tree.leaves(slots[name])[0]
        slots[name] = node.advance(slots[name], *map(jnp.asarray, finite), *node.arguments)
    if happens:
        losses = dict.fromkeys(WHOLE_BATCH_LOSSES, partial(_loss_at, inner, before, batch))
        offered = {"value": metrics["loss"], "grad": grads, **losses}
        updates, opt_state = run_optimizer(update.optimizer, grads, state.opt_state, trained, offered, update.written)
        trained = optax.apply_updates(trained, updates)
        for node in outer:
            if isinstance(node, FollowNode):
                old = slots[names[id(node)]]
                slots[names[id(node)]] = node.advance(old, trained, state.step + 1, *node.arguments)
        params = with_frozen(trained, state.params, _wrt(inner))
        state = replace(state, params=params, opt_state=opt_state, step=state.step + 1, model_state=model_state)
    for node in guards:
        name, count = names[id(node)], 0 if happens else 1
        total, consecutive = slots[name]
        slots[name] = type(slots[name])(total + count, (consecutive + count) * count)
        metrics["skipped"] = jnp.asarray(count, jnp.int32)
    return replace(state, slots=slots), metrics, finite


def _loss_at(inner: Program, state: EvaluationState, batch: Tree, trained: Tree) -> Any:  # Any: a scalar
    """The loss of the whole batch at other parameters."""
    params = with_frozen(trained, state.params, _wrt(inner))
    rows = np.arange(len(jax.tree.leaves(batch)[0]))
    return _gradient_of_rows(inner, replace(state, params=params), batch, rows).reported()["loss"]


def _gradient_of_rows(
    program: Program, state: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any = 1.0
) -> _SummedGradient:  # Any: what the loss is multiplied by
    node, inner = program[0], program[1:]
    match node:
        case DifferentiateNode():
            return _differentiated(node, state, batch, rows, factor)
        case MeanNode():
            return _averaged(node, inner, state, batch, rows, factor)
        case ScaleNode(by):
            return _gradient_of_rows(inner, state, batch, rows, factor).linear(lambda leaf: leaf * by)
        case RescaleNode():
            by = jax.tree.leaves(state.slots[_name(program, node)])[0]
            return _gradient_of_rows(inner, state, batch, rows, factor * by).linear(lambda leaf: leaf / by)
        case MapNode():
            summed = _gradient_of_rows(inner, state, batch, rows, factor).complete()
            value = summed.value()
            key = (_key(state, draw_tag(_name(program, node)), rows[0]),) if node.draws else ()
            measured, before = node.measured(value, _trained(inner, state), partial(squares_of, value))
            grads, after = node.applied(value, measured, *key)
            added = {name: Mean(metric, 1) for name, metric in {**before, **after}.items()}
            return replace(summed, terms=((_widened(grads), 1),), metrics={**summed.metrics, **added})
        case PerturbNode():
            here = _gradient_of_rows(inner, state, batch, rows, factor).complete()
            moved = node.function(_trained(inner, state), here.value(), *node.arguments)
            params = with_frozen(moved, state.params, _wrt(inner))
            there = _gradient_of_rows(inner, replace(state, params=params), batch, rows, factor)
            return replace(here, terms=there.complete().terms)
        case UpdateNode() | FollowNode() | GuardNode() | RepeatNode() | AlternateNode():
            raise ValueError(f"`{node}` must be outside the gradient, and appear once")
        case _:
            assert_never(node)


def _differentiated(
    node: DifferentiateNode, state: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any
) -> _SummedGradient:
    microbatch = jax.tree.map(lambda leaf: leaf[rows], batch)
    keys = ()
    if node.rng is not None:
        drawn = [_key(state, row) for row in (rows if node.rng == "example" else rows[:1])]
        keys = (jnp.stack(drawn) if node.rng == "example" else drawn[0],)

    has_state = node.model_state is not None
    given = _given_model_state(node, state, rows)
    read = {name: {**state.slots, "step": state.step}[name] for name in node.reads}
    if node.head is not None:
        return _encoded(node, state, batch, rows, factor)

    def outcome(trained: Tree) -> LossOutcome:
        params = with_frozen(trained, state.params, node.wrt)
        returned = node.function(params, microbatch, *keys, *((same_tree(given),) if has_state else ()), **read)
        return loss_outcome(returned, has_aux=node.has_aux, model_state=has_state)

    trained = trained_leaves(state.params, node.wrt)
    found = outcome(trained)
    # The model state is a constant of the gradient, wherever the loss of the whole batch is differentiated.
    found = found._replace(model_state=jax.lax.stop_gradient(found.model_state))
    terms = []
    for number, term in enumerate(found.terms):
        unit = power_of_two(term.count)
        by = factor / unit
        grads = jax.grad(lambda trained, number=number, by=by: outcome(trained).terms[number].total * by)(trained)
        terms.append((jax.tree.map(lambda leaf, unit=unit: leaf * unit, _widened(grads)), term.count))
    after = found.model_state
    if overwritten := overwritten_leaves(given):

        def of_model_state(leaves: list[Any]) -> Any:  # Any: arrays
            returned = node.function(state.params, microbatch, *keys, overwrite(given, leaves), **read)
            terms = loss_outcome(returned, has_aux=node.has_aux, model_state=True).terms
            return sum_arrays([term.total / power_of_two(term.count) for term in terms]) * factor

        after = overwrite(after, jax.grad(of_model_state)(overwritten))
    calls = (_Call(rows, jax.tree.leaves(given), jax.tree.leaves(after)),) if has_state else ()
    return _SummedGradient(tuple(terms), {"loss": Sums(found.terms), **found.metrics}, found.model_state, calls)


def _averaged(
    mean: MeanNode, inner: Program, state: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any
) -> _SummedGradient:
    parts: list[_SummedGradient] = []
    for part in _split(mean, rows):
        parts.append(_gradient_of_rows(inner, state, batch, part, factor))
        if isinstance(mean.place, InScan):
            state = replace(state, model_state=_handed_on(inner[-1], state.model_state, parts[-1].model_state))

    def add(one: Any, two: Any) -> Any:
        dtype = mean.dtype or one.dtype
        return one.astype(dtype) + two.astype(dtype)

    def both(one: _SummedGradient, two: _SummedGradient) -> _SummedGradient:
        pairs = zip(one.terms, two.terms, strict=True)
        terms = tuple((jax.tree.map(add, a[0], b[0]), a[1] + b[1]) for a, b in pairs)
        metrics = {name: combine_metrics(one.metrics[name], two.metrics[name]) for name in one.metrics}
        return _SummedGradient(terms, metrics, None, one.calls + two.calls, one.whole, one.then)

    model_states = [part.model_state for part in parts]
    rules = _rules(inner[-1], state.model_state)
    model_state = model_states[-1] if isinstance(mean.place, InScan) else _mean(rules, model_states)
    return replace(reduce(both, parts), model_state=model_state)


def _encoded(
    node: DifferentiateNode, state: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any
) -> _SummedGradient:
    """One call of the encoder of a loss of the whole batch: its model state, and nothing else yet."""
    given = _given_model_state(node, state, rows)
    call = _Call(rows, jax.tree.leaves(given), jax.tree.leaves(given))
    after = None
    if node.model_state is not None:
        after = jax.lax.stop_gradient(_encode(node, state, batch, call, trained_leaves(state.params, node.wrt))[1])
        call = replace(call, after=jax.tree.leaves(after))
    return _SummedGradient((), {}, after, (call,), partial(_of_whole_batch, node, state, batch, factor))


def _encode(
    node: DifferentiateNode, state: EvaluationState, batch: Tree, call: _Call, trained: Tree
) -> tuple[Tree, Tree]:
    """What the encoder returns for the rows of a call, and the model state."""
    keys = ()
    if node.rng is not None:
        drawn = [_key(state, row) for row in (call.rows if node.rng == "example" else call.rows[:1])]
        keys = (jnp.stack(drawn) if node.rng == "example" else drawn[0],)
    given = () if node.model_state is None else (jax.tree.structure(state.model_state).unflatten(call.before),)
    read = {name: {**state.slots, "step": state.step}[name] for name in node.reads}
    microbatch = jax.tree.map(lambda leaf: leaf[call.rows], batch)
    returned = node.function(with_frozen(trained, state.params, node.wrt), microbatch, *keys, *given, **read)
    return returned if node.model_state is not None else (returned, None)


def _of_whole_batch(
    node: DifferentiateNode, state: EvaluationState, batch: Tree, factor: Any, calls: tuple[_Call, ...]
) -> _SummedGradient:
    """The encoder's vector-Jacobian products, call by call, for the cotangents that the head gives the whole batch."""
    trained = trained_leaves(state.params, node.wrt)
    position = {row: place for place, row in enumerate(sorted(int(row) for call in calls for row in call.rows))}
    places = [np.array([position[int(row)] for row in call.rows]) for call in calls]
    pulls: list[Any] = []  # Any: functions of cotangents
    rows: list[Any] = []  # Any, twice: arrays, by leaf
    sums: list[Any] = []
    tree: EncodedTree | None = None
    for call, place in zip(calls, places, strict=True):

        def encode(trained: Tree, call: _Call = call) -> tuple[list[Any], tuple[EncodedTree, Encoded]]:
            returned, _ = _encode(node, state, batch, call, trained)
            found, arrays = take_apart(returned, len(call.rows), node.written)
            return list(filter(is_floating, (*arrays.rows, *arrays.sums))), (found, arrays)

        _, pull, (tree, arrays) = jax.vjp(encode, trained, has_aux=True)
        pulls.append(pull)
        empty = [jnp.zeros((len(position), *leaf.shape[1:]), leaf.dtype) for leaf in arrays.rows]
        rows = [old.at[place].set(new) for old, new in zip(rows or empty, arrays.rows, strict=True)]
        sums = [old + new for old, new in zip(sums, arrays.sums, strict=True)] if sums else list(arrays.sums)
    assert tree is not None
    leaves = [*rows, *sums]

    def value(trained: Tree, floats: dict[int, Any]) -> tuple[Any, LossOutcome]:
        given = [floats.get(number, leaf) for number, leaf in enumerate(leaves)]
        z = tree.join(Encoded(tuple(given[: len(rows)]), tuple(given[len(rows) :])))
        returned = node.head(with_frozen(trained, state.params, node.wrt), z)  # pyright: ignore[reportOptionalCall]
        outcome = loss_outcome(returned, has_aux=node.has_aux, model_state=False)
        return factor * sum_arrays([divide_by_count(one.total, one.count) for one in outcome.terms]), outcome

    floats = {number: leaf for number, leaf in enumerate(leaves) if is_floating(leaf)}
    (total, cotangents), outcome = jax.grad(value, argnums=(0, 1), has_aux=True)(trained, floats)
    total = _widened(total)
    for pull, place in zip(pulls, places, strict=True):
        local = [one[place] if number < len(rows) else one for number, one in cotangents.items()]
        total = jax.tree.map(jnp.add, total, _widened(pull(local)[0]))
    return _SummedGradient(((total, 1),), {"loss": Sums(outcome.terms), **outcome.metrics}, None)


def _split(mean: MeanNode, rows: np.ndarray) -> list[np.ndarray]:
    match mean.place:
        case InScan(size):
            return list(rows.reshape(-1, size).T)
        case OverMesh():
            return list(rows.reshape(mean.size, -1))
        case UnderVmap():
            return list(rows.reshape(-1, 1))
        case _:
            assert_never(mean.place)


def _rules(node: Any, model_state: Tree) -> tuple[str, ...]:  # Any: a node, the last of a program
    return rules_by_leaf(node.model_state or (), model_state)


def _given_model_state(node: DifferentiateNode, state: EvaluationState, rows: np.ndarray) -> Tree:
    leaves, tree = jax.tree.flatten(state.model_state)
    taken = {"rows": lambda leaf: leaf[rows], "key": lambda leaf: fold_key(leaf, rows[0])}
    rules = _rules(node, state.model_state)
    return tree.unflatten([taken.get(rule, lambda leaf: leaf)(leaf) for rule, leaf in zip(rules, leaves, strict=True)])


def _handed_on(node: Any, before: Tree, after: Tree) -> Tree:  # Any: a node
    leaves, tree = jax.tree.flatten(before)
    triples = zip(_rules(node, before), leaves, jax.tree.leaves(after), strict=True)
    return tree.unflatten([new if rule == "sequential" else old for rule, old, new in triples])


def _mean(rules: tuple[str, ...], trees: list[Tree]) -> Tree:
    """The mean of the leaves that are handed on; of the others the calls keep what counts."""

    def mean(rule: str, leaves: tuple[Any, ...]) -> Any:  # Any: arrays
        arrays = [np.asarray(leaf) for leaf in leaves] if rule == "sequential" else []
        if not arrays or all(array.tobytes() == arrays[0].tobytes() for array in arrays):
            return leaves[0]
        if not jnp.issubdtype(arrays[0].dtype, jnp.floating):
            raise ValueError("whole numbers that differ have no mean")
        return jnp.asarray(np.mean([array.astype(np.float64) for array in arrays], axis=0), arrays[0].dtype)

    each = zip(*map(jax.tree.leaves, trees), strict=True)
    return jax.tree.structure(trees[0]).unflatten([mean(*pair) for pair in zip(rules, each, strict=True)])


def _next_model_state(node: Any, before: Tree, summed: _SummedGradient) -> tuple[Tree, bool]:  # Any: a node
    """By the calls, however they were nested: whole numbers in Python's integers, floats in float64."""
    leaves, tree = jax.tree.flatten(before)
    handed_on, made, fits = jax.tree.leaves(summed.model_state), [], True
    for place, (rule, leaf) in enumerate(zip(_rules(node, before), leaves, strict=True)):
        after = [call.after[place] for call in summed.calls]
        match rule:
            case "sequential":
                made.append(handed_on[place])
            case "constant":
                made.append(leaf)
            case "key":
                made.append(fold_key(leaf, ADVANCE))
            case "max":
                made.append(reduce(jnp.maximum, after))
            case "average":
                made.append(jnp.asarray(np.mean([np.asarray(one, np.float64) for one in after], axis=0), leaf.dtype))
            case "rows":
                for call, one in zip(summed.calls, after, strict=True):
                    leaf = leaf.at[call.rows].set(one)
                made.append(leaf)
            case _:
                is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
                old, *new = [np.asarray(one).astype(np.float64 if is_floating else object) for one in (leaf, *after)]
                total = old + sum(one - old for one in new)
                largest = jnp.finfo(leaf.dtype).max if is_floating else jnp.iinfo(leaf.dtype).max
                smallest = -largest if is_floating else jnp.iinfo(leaf.dtype).min
                fits = fits and bool(np.all((total >= smallest) & (total <= largest)))
                if not is_floating:  # as the dtype would hold it
                    total = (total - smallest) % (largest - smallest + 1) + smallest
                made.append(jnp.asarray(np.asarray(total).astype(leaf.dtype)))
    return tree.unflatten(made), fits


def _wrt(program: Program) -> tuple[str, ...]:
    return next(node.wrt for node in program if isinstance(node, DifferentiateNode))


def _trained(program: Program, state: EvaluationState) -> Tree:
    return trained_leaves(state.params, _wrt(program))


def _widened(grads: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), grads)


def _name(program: Program, node: Any) -> str:  # Any: a node with a name
    # By identity, since two equal nodes have two names. Nodes on the left do not change the names on the right.
    return next(name for name, one in named(program).items() if one is node)


def _key(state: EvaluationState, *numbers: Any) -> Any:  # Any: integers; a typed key
    return reduce(jax.random.fold_in, numbers, jax.random.fold_in(state.rng, state.step))
