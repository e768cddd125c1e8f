"""Every transform, and every pair in both orders where legal: the compiled step equals its reference."""

from itertools import product
from typing import Any

import jax
import numpy as np
import optax
import pytest
from catalogue import (
    EXACT,
    LOSSES,
    ROUNDED,
    SAMPLES,
    SOURCES,
    STEPS,
    WHOLE,
    fits,
    over_pairs,
    probe_batch,
    probe_model_state,
    probe_params,
)
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st

import stepc as sc
from stepc.testing import assert_equivalent
from stepc.testing.probes import encoding

NAMES = [*LOSSES, *EXACT, *ROUNDED, *STEPS]
# Rows, which rows share a call, keys, state, what is frozen, the whole batch.
PROBES = ("over_rows", "coupling_rows", "drawing", "recurrent", "on_frozen", "whole")
SPLITS = ("accumulate", "shard")


def is_legal(outer: str, inner: str) -> bool:
    """The language refuses to split one row again, what may appear once twice, what is outermost inside, and more."""
    one, two = SAMPLES[outer], SAMPLES[inner]
    if outer == "rows" and inner.startswith(SPLITS) and inner != "accumulate_one":
        return False
    if type(one) is type(two) and one.position != "anywhere":
        return False
    if (outer, inner) == ("cast_any", "cast"):
        return False  # the inner one refuses what the outer one narrowed: it is not float32
    if outer == "loss_scale" and any(isinstance(node, sc.nodes.MapNode) for node in two.expand()):
        return False  # it would see the gradient of the scaled loss
    return not (two.position == "outermost" and outer in STEPS)


PAIRS = [pair for pair in product(NAMES, NAMES) if is_legal(*pair)]


KNOWN = {**SOURCES, **WHOLE}
CASES = [(pair, probe) for pair, probe in product(PAIRS, PROBES) if all(fits(name, KNOWN[probe]) for name in pair)]


def composed(outer: str, inner: str, probe: str) -> sc.Pipeline:
    """Both transforms in a pipeline, `outer` on the left of `inner` where they have the same kind."""
    names = (outer,) if outer == inner else (outer, inner)
    transforms = [
        SAMPLES[name] if name != "shard" or n == 0 else sc.shard(sc.dp("data")) for n, name in enumerate(names)
    ]
    source = KNOWN[probe]
    loss: Any = encoding if probe == "whole" else source.loss.value  # pyright: ignore[reportAttributeAccessIssue]
    for name, transform in reversed(list(zip(names, transforms, strict=True))):
        loss = transform @ loss if name in LOSSES else loss
    loss = sc.across(over_pairs) @ loss if probe == "whole" else loss
    pipeline: Any = sc.grad(loss, rng=source.rng, model_state=source.model_state, wrt=source.wrt)
    for name, transform in reversed(list(zip(names, transforms, strict=True))):
        pipeline = transform @ pipeline if name in (*EXACT, *ROUNDED) else pipeline
    # A single row has no parts, so with `rows` nothing else splits the batch.
    pipeline = sc.update(optax.sgd(0.5)) @ (pipeline if "rows" in names else sc.accumulate(2) @ pipeline)
    for name, transform in reversed(list(zip(names, transforms, strict=True))):
        pipeline = transform @ pipeline if name in STEPS else pipeline
    return pipeline


def in_turn(outer: str, inner: str, probe: str) -> sc.Pipeline:
    """Two turns, the second with `inner`, and a transform of whole steps outside of both."""
    parts = sc.accumulate(2) @ SAMPLES["shard"] if inner == "shard" else sc.accumulate(2)  # turns are sharded alike
    first = sc.update(optax.adam(1e-2)) @ parts @ KNOWN[probe]
    turns = sc.alternate(first=first, second=composed(inner, inner, probe), every={"first": 2})
    return SAMPLES[outer] @ turns


def assert_pair(outer: str, inner: str, probe: str) -> None:
    assert_equal_to_reference(composed(outer, inner, probe), {outer, inner}, probe)


def assert_equal_to_reference(pipeline: sc.Pipeline, names: set[str], probe: str) -> None:
    step = sc.compile(pipeline, mesh=mesh_of(data=2))
    batch = probe_batch(32)
    if step.rows_axis:
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * step.steps_per_call), batch)
    is_narrow = names & {"accumulate_narrow", "cast", "cast_any"}
    # Narrow dtypes hold 8 or 11 bits, and a compiled program rounds in another order. Where a parameter and its update
    # nearly cancel, one rounding is large relative to the rest: 3e-5 of it was seen. A wrong transform is off by more.
    source = KNOWN[probe]
    state = step.init(probe_params(source), model_state=probe_model_state(source, 32))
    assert_equivalent(step, state, batch, tolerance=0.2 if is_narrow else 1e-3)


@settings(max_examples=60)
@given(case=st.sampled_from(CASES))
def test_pair_of_transforms_equals_its_reference(case: tuple[tuple[str, str], str]) -> None:
    pair, probe = case
    assert_pair(*pair, probe)


@pytest.mark.long
@pytest.mark.parametrize(("pair", "probe"), CASES)
def test_every_pair_of_transforms_equals_its_reference(pair: tuple[str, str], probe: str) -> None:
    assert_pair(*pair, probe)


TURN_CASES = [
    (pair, probe)
    for pair, probe in product(product(STEPS, (*LOSSES, *EXACT, *ROUNDED)), PROBES)
    if all(fits(name, KNOWN[probe]) for name in pair)
]


@settings(max_examples=20)
@given(case=st.sampled_from(TURN_CASES))
def test_transform_in_a_turn_equals_its_reference(case: tuple[tuple[str, str], str]) -> None:
    pair, probe = case
    assert_equal_to_reference(in_turn(*pair, probe), set(pair), probe)


@pytest.mark.long
@pytest.mark.parametrize(("pair", "probe"), TURN_CASES)
def test_every_transform_in_a_turn_equals_its_reference(pair: tuple[str, str], probe: str) -> None:
    assert_equal_to_reference(in_turn(*pair, probe), set(pair), probe)
