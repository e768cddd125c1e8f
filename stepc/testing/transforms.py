"""The rules that every transform keeps, ours and our users': `check_transform` checks them all."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
import optax

from stepc._compiler.step import compile as compile_step
from stepc._core.nodes import Node, Wrap, show
from stepc._language.kinds import Kind
from stepc._language.pipeline import Pipeline, Transform, expand_transforms
from stepc._language.reference import reference
from stepc._language.state import State
from stepc._language.transforms.accumulate import accumulate
from stepc._language.transforms.grad import grad
from stepc._language.transforms.update import update
from stepc.errors import EquivalenceError
from stepc.testing.assertions import assert_equal_trees, assert_equivalent
from stepc.testing.evaluate import EvaluationState, evaluate
from stepc.testing.probes import PROBES, Probe, probe_batch, probe_params

_NUM_ROWS = 16


def check_transform(transform: Transform, *, tolerance: float = 1e-5) -> None:
    """Check that a transform keeps the rules that the compiler relies on.

    Meaning: it is a frozen, hashable, printable value; its expansion means what its `reference` says; compiled, alone
      and on both sides of `accumulate`, it equals its reference, for every probe loss.
    Why: it makes a transform of your own as safe to compose as ours.

    Args:
      transform: any transform that names no mesh axis and no batch size: of losses, of gradients, of steps, or an
        `update`.
      tolerance: as in `assert_equivalent`; 0 for a transform that is exact on whole numbers.
    Errors: EquivalenceError that names the broken rule; what the transform itself raises passes through.
    Example:
      >>> check_transform(clip(1.0))

    Source: ours.
    """
    _check_value(transform)
    for name, probe in PROBES.items():
        for pipeline in _pipelines(transform, probe):
            _check_expansion(pipeline, name, tolerance)
            step = compile_step(pipeline)
            assert_equivalent(step, step.init(probe_params()), probe_batch(_NUM_ROWS), tolerance=tolerance)


def _check_value(transform: Transform) -> None:
    rules = {
        "be a subclass of stepc.Transform": lambda: isinstance(transform, Transform),
        "be a frozen dataclass": lambda: is_dataclass(transform) and type(transform).__dataclass_params__.frozen,  # pyright: ignore[reportAttributeAccessIssue]
        "equal a copy of itself": lambda: replace(transform) == transform,
        "hash as a copy of itself": lambda: hash(replace(transform)) == hash(transform),
        "print as a call": lambda: repr(transform).endswith(")") and "(" in repr(transform),
        "give a kind": lambda: isinstance(transform.gives, Kind),
        "expand to core nodes, or to wraps if it transforms losses": lambda: all(
            isinstance(node, Wrap if transform.gives is Kind.LOSS else Node) for node in transform.expand()
        ),
        "expand to equal nodes each time": lambda: transform.expand() == transform.expand(),
        "expand to hashable nodes": lambda: isinstance(hash(transform.expand()), int),
    }
    for rule, holds in rules.items():
        if not holds():
            raise EquivalenceError(f"A transform must {rule}; `{transform!r}` does not.")


def _pipelines(transform: Transform, probe: Probe) -> list[Pipeline]:
    first, last = grad(probe), update(optax.sgd(0.5))
    match transform.takes, transform.gives:
        case _, Kind.LOSS:
            inside = grad(transform @ probe)
            return [last @ inside, last @ accumulate(4) @ inside]
        case Kind.STEP, Kind.STEP:
            return [transform @ last @ first, transform @ last @ accumulate(2) @ first]
        case _, Kind.STEP:
            return [transform @ first, transform @ accumulate(2) @ first]
        case _:
            return [
                last @ transform @ first,
                last @ transform @ accumulate(4) @ first,
                last @ accumulate(2) @ transform @ accumulate(2) @ first,
            ]


def _check_expansion(pipeline: Pipeline, probe: str, tolerance: float) -> None:
    step, batch = reference(pipeline), probe_batch(_NUM_ROWS)
    state = step.init(jax.tree.map(jax.numpy.asarray, probe_params()))
    after, metrics = step(state, batch)
    program = expand_transforms(pipeline.transforms)
    evaluated = evaluate(program, evaluation_state(state), jax.tree.map(jax.numpy.asarray, batch))
    of = f"the reference of `{pipeline!r}` and its expansion `{show(program)}`, for the loss {probe!r}"
    expected = (compared_leaves(evaluation_state(after)), metrics)
    assert_equal_trees((compared_leaves(evaluated[0]), evaluated[1]), expected, tolerance=tolerance, of=of)


def evaluation_state(state: State) -> EvaluationState:
    """A state as `evaluate` takes it."""
    return EvaluationState(state.params, state.opt_state, state.step, state.rng, state.model_state, state.slots)


def compared_leaves(state: EvaluationState) -> dict[str, Any]:  # Any: trees of arrays
    """Everything in it that a step changes, as a tree."""
    return {one.name: getattr(state, one.name) for one in fields(state) if one.name != "rng"}
