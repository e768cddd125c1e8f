"""Transforms and pipelines are values: they print as their source, compare, hash, and compose associatively."""

import copy
import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from catalogue import PROBES, SAMPLES, probe_batch, probe_params

import stepc as sc
from stepc.testing import check_transform

LOSS = PROBES["over_rows"]
ADAM = optax.adam(1e-3)


def test_pipeline_prints_as_the_source_that_made_it() -> None:
    pipeline = sc.update(optax.adamw(3e-4)) @ sc.clip(1.0) @ sc.accumulate(4) @ sc.shard(sc.dp("data")) @ sc.grad(LOSS)
    assert repr(pipeline) == ('update(optax.adamw(3e-4)) @ clip(1.0) @ accumulate(4) @ shard(dp("data")) @ grad(LOSS)')


def test_pipeline_printed_and_evaluated_is_equal() -> None:
    pipeline = sc.update(ADAM) @ sc.scale(0.5) @ sc.clip(2) @ sc.accumulate(4) @ sc.shard(sc.dp("data")) @ sc.grad(LOSS)
    assert eval(repr(pipeline), vars(sc) | {"ADAM": ADAM, "LOSS": LOSS}) == pipeline


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (sc.update(optimizer=optax.adam(1e-3)), "update(optax.adam(1e-3))"),
        (sc.grad(loss=LOSS), "grad(LOSS)"),
        (sc.grad(lambda p, b: p["w"].sum()), 'grad(lambda p, b: p["w"].sum())'),
        (sc.update(*[ADAM]), "update(optimizer)"),
        (sc.scale(-2), "scale(-2)"),
    ],
)  # fmt: skip
def test_transform_prints_its_argument_as_it_was_written(transform: sc.Transform, text: str) -> None:
    assert repr(transform) == text


def test_argument_that_is_long_or_unreadable_prints_as_a_name() -> None:
    schedule = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=10, decay_steps=100))
    assert repr(sc.update(schedule)) == "update(schedule)"
    transform = sc.update(optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=10, decay_steps=100)))
    assert repr(transform) == "update(optimizer)"
    assert repr(eval("sc.grad(LOSS)")) == "grad(over_rows)"


def test_composition_is_associative() -> None:
    a, b, c, d = sc.update(ADAM), sc.clip(1.0), sc.accumulate(4), sc.grad(LOSS)
    assert ((a @ b) @ c) @ d == a @ (b @ (c @ d)) == (a @ b) @ (c @ d)


def test_calling_is_composing() -> None:
    gradient = sc.accumulate(4)(sc.grad(LOSS))
    assert gradient == sc.accumulate(4) @ sc.grad(LOSS)
    assert (sc.update(ADAM) @ sc.clip(1.0))(gradient) == sc.update(ADAM) @ sc.clip(1.0) @ gradient


def test_partial_pipeline_is_a_value_that_completes_twice() -> None:
    partial = sc.update(ADAM) @ sc.clip(1.0)
    assert partial @ sc.grad(LOSS) == partial @ sc.grad(LOSS)
    assert partial.takes is sc.Kind.GRADIENT
    assert partial.gives is sc.Kind.STEP
    assert (partial @ sc.grad(LOSS)).takes is None


@pytest.mark.parametrize("name", SAMPLES)
def test_transform_compares_and_hashes_by_its_fields(name: str) -> None:
    transform = SAMPLES[name]
    assert copy.copy(transform) == transform
    assert hash(dataclasses.replace(transform)) == hash(transform)
    assert len({transform, copy.copy(transform)}) == 1
    assert sum(transform == other for other in SAMPLES.values()) == 1


def test_transforms_made_on_different_lines_are_equal() -> None:
    one = sc.accumulate(4)
    two = sc.accumulate(4)
    assert one == two
    assert one != sc.accumulate(8)
    assert sc.clip(1) == sc.clip(1.0)
    assert sc.accumulate(1) != sc.clip(1.0)


def test_transform_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sc.accumulate(4).k = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_partial_pipeline_of_plain_fields_survives_pickling() -> None:
    partial = sc.clip(1.0) @ sc.accumulate(4) @ sc.shard(sc.dp("data"))
    assert pickle.loads(pickle.dumps(partial)) == partial


@pytest.mark.parametrize("name", ["clip", "scale", "accumulate", "noise", "update", "ema", "skip_nonfinite", "remat"])
def test_transform_passes_check_transform(name: str) -> None:
    check_transform(SAMPLES[name])


@dataclasses.dataclass(frozen=True, repr=False)
class Signed(sc.Transform):
    """A user's own transform, as the README shows it."""

    takes = sc.Kind.GRADIENT
    gives = sc.Kind.GRADIENT
    rate: float

    def reference(self, inner: sc.Fn) -> sc.Fn:
        def apply(state: sc.State, microbatch: sc.Microbatch) -> sc.Gradient:
            return inner.apply(state, microbatch).map(signs, self.rate)

        return sc.Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[sc.nodes.MapNode, ...]:
        return (sc.nodes.MapNode(signs, (self.rate,), written=repr(self)),)


def signs(grads: object, rate: float) -> tuple[object, dict[str, jax.Array]]:
    return jax.tree.map(lambda leaf: rate * jax.numpy.sign(leaf), grads), {}


def test_users_own_transform_passes_check_transform() -> None:
    check_transform(Signed(0.5), tolerance=0.0)


class Doubled(Signed):
    """Its expansion is not its reference."""

    def expand(self) -> tuple[sc.nodes.MapNode, ...]:
        return (sc.nodes.MapNode(signs, (2 * self.rate,)),)


def test_transform_whose_expansion_differs_is_caught() -> None:
    with pytest.raises(sc.EquivalenceError, match="reference of .*expansion") as caught:
        check_transform(Doubled(0.5), tolerance=0.0)
    # The user's line is a call of `check_transform`: its argument is not that of the `update` which was made there.
    assert "update(optimizer) @ doubled(0.5) @ grad(over_rows)" in str(caught.value)


class Linear(Signed):
    """It claims to be linear: the compiler would move it past the mean."""

    def expand(self) -> tuple[sc.nodes.ScaleNode, ...]:
        return (sc.nodes.ScaleNode(self.rate),)


def test_transform_that_claims_to_be_linear_is_caught() -> None:
    with pytest.raises(sc.EquivalenceError):
        check_transform(Linear(0.5))


def test_remedy_for_a_transform_of_the_loss_beside_a_gradient_transform_can_be_executed() -> None:
    def loss(params: Any, rows: Any) -> Any:
        return jnp.mean(rows["x"] @ params["w"])

    with pytest.raises(sc.PipelineTypeError) as raised:
        sc.clip(1.0) @ sc.cast(jnp.bfloat16)
    assert raised.value.suggestion == "Write `clip(1.0) @ grad(cast(jnp.bfloat16) @ loss)`."
    written = raised.value.suggestion.split("`")[1]
    names = {"clip": sc.clip, "grad": sc.grad, "cast": sc.cast, "jnp": jnp, "loss": loss}
    assert repr(eval(written, names)) == written


def test_transform_that_is_not_linear_acts_on_the_unscaled_gradient_where_the_remedy_puts_it() -> None:
    sgd, scale, source = sc.update(optax.sgd(1.0)), sc.loss_scale(initial=1024.0), sc.grad(LOSS)
    with pytest.raises(sc.PipelineTypeError) as raised:
        sgd @ scale @ sc.clip(0.5) @ source
    remedy = str(raised.value.suggestion).removeprefix("Write `").removesuffix("`.")
    moved = eval(remedy, vars(sc) | {"optax": optax}) @ source
    batch = jax.tree.map(jax.numpy.asarray, probe_batch(8))
    reference = sc.reference(moved)
    start = reference.init(jax.tree.map(jax.numpy.asarray, probe_params()))
    state, _ = reference(start, batch)
    step = jax.tree.map(lambda new, old: new - old, state.params, start.params)
    assert float(optax.tree.norm(step)) == pytest.approx(0.5, rel=1e-6)  # 0.5 / 1024 where clip saw the scaled one


class Unhashable:
    """A loss that has no hash, as a module that holds arrays has none."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, params: object, rows: object) -> jax.Array:
        return LOSS(params, rows)


def test_loss_without_a_hash_composes() -> None:
    assert (
        len((sc.update(ADAM) @ sc.loss_scale() @ sc.accumulate(memory="1GiB") @ sc.grad(Unhashable())).transforms) == 4
    )
