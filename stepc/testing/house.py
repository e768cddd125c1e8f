"""The rules that every transform keeps, ours and our users'. One call checks them all."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
import optax

from stepc._compiler.step import compile as compile_step
from stepc._core.nodes import Node
from stepc._core.nodes import Wrap
from stepc._core.nodes import show
from stepc._language.kinds import Kind
from stepc._language.pipeline import Pipeline
from stepc._language.pipeline import Transform
from stepc._language.pipeline import expand_transforms
from stepc._language.reference import reference
from stepc._language.state import State
from stepc._language.transforms.accumulate import accumulate
from stepc._language.transforms.grad import grad
from stepc._language.transforms.update import update
from stepc.errors import EquivalenceError
from stepc.testing.assertions import assert_equal_trees
from stepc.testing.assertions import assert_equivalent
from stepc.testing.evaluate import EvaluationState
from stepc.testing.evaluate import evaluate
from stepc.testing.probes import PROBES
from stepc.testing.probes import probe_batch
from stepc.testing.probes import probe_params

_NUM_ROWS = 16


def check_transform(transform: Transform, *, tolerance: float = 1e-5) -> None:
    """Hold a transform to the rules of the house.

    Meaning: it is a frozen, hashable, printable value; its expansion means what the transform means; compiled, alone and
      on both sides of `accumulate`, it equals its reference, for every probe loss.
    Why: a transform of your own is then as safe to compose as ours.

    Args:
      transform: any transform that names no mesh axis and no size of a batch: of losses, of gradients, of steps, or an `update`.
      tolerance: as in `assert_equivalent`; 0 for a transform that is exact on whole numbers.
    Errors: EquivalenceError that names the rule that is broken; what the transform itself raises passes through.
    Example:
      >>> check_transform(clip(1.0))

    Source: ours.
    """
    _is_a_value(transform)
    for name, probe in PROBES.items():
        for pipeline in _pipelines(transform, probe):
            _expansion_means_the_same(pipeline, name, tolerance)
            step = compile_step(pipeline)
            assert_equivalent(step, step.init(probe_params()), probe_batch(_NUM_ROWS), tolerance=tolerance)


def _is_a_value(transform: Transform) -> None:
    rules = {
        "is a subclass of stepc.Transform": lambda: isinstance(transform, Transform),
        "is a frozen dataclass": lambda: is_dataclass(transform) and type(transform).__dataclass_params__.frozen,  # pyright: ignore[reportAttributeAccessIssue]
        "equals a copy of itself": lambda: replace(transform) == transform,
        "hashes as a copy of itself": lambda: hash(replace(transform)) == hash(transform),
        "prints as a call": lambda: repr(transform).endswith(")") and "(" in repr(transform),
        "gives a kind": lambda: isinstance(transform.gives, Kind),
        "expands to core nodes, a transform of losses to wraps": lambda: all(
            isinstance(node, Wrap if transform.gives is Kind.LOSS else Node) for node in transform.expand()
        ),
        "expands to the same nodes again": lambda: transform.expand() == transform.expand(),
        "expands to nodes that hash": lambda: isinstance(hash(transform.expand()), int),
    }
    for rule, holds in rules.items():
        if not holds():
            raise EquivalenceError(f"A transform of stepc {rule}; `{transform!r}` does not.")


def _pipelines(transform: Transform, probe: Any) -> list[Pipeline]:  # Any: a probe
    begin, end = grad(probe), update(optax.sgd(0.5))
    match transform.takes, transform.gives:
        case _, Kind.LOSS:
            inside = grad(transform @ probe)
            return [end @ inside, end @ accumulate(4) @ inside]
        case Kind.STEP, Kind.STEP:
            return [transform @ end @ begin, transform @ end @ accumulate(2) @ begin]
        case _, Kind.STEP:
            return [transform @ begin, transform @ accumulate(2) @ begin]
        case _:
            return [
                end @ transform @ begin,
                end @ transform @ accumulate(4) @ begin,
                end @ accumulate(2) @ transform @ accumulate(2) @ begin,
            ]


def _expansion_means_the_same(pipeline: Pipeline, probe: str, tolerance: float) -> None:
    meaning, batch = reference(pipeline), probe_batch(_NUM_ROWS)
    state = meaning.init(jax.tree.map(jax.numpy.asarray, probe_params()))
    after, metrics = meaning(state, batch)
    program = expand_transforms(pipeline.transforms)
    got, told = evaluate(program, world_of(state), jax.tree.map(jax.numpy.asarray, batch))
    of = f"the meaning of `{pipeline!r}` and of its expansion `{show(program)}`, for the loss {probe!r}"
    assert_equal_trees((as_seen(got), told), (as_seen(world_of(after)), metrics), tolerance=tolerance, of=of)


def world_of(state: State) -> EvaluationState:
    """A state as the core sees it."""
    return EvaluationState(state.params, state.opt_state, state.step, state.rng, state.model_state, state.slots)


def as_seen(world: EvaluationState) -> dict[str, Any]:  # Any: trees of arrays
    """All of it that changes, as a tree."""
    return {one.name: getattr(world, one.name) for one in fields(world) if one.name != "rng"}
