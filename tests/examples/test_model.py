"""The model: what it may see, what its loss is, how it writes."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stepc as sc
from examples.gpt import model as gpt

SIZE = gpt.Size(layers=2, width=16, heads=2, context=8)
LOGITS = jax.jit(partial(gpt.logits, size=SIZE))
LOSS = jax.jit(gpt.make_loss(SIZE))


@cache
def params() -> gpt.GPT:
    return gpt.init(jax.random.key(0), SIZE)


def windows(rows: int) -> dict[str, jax.Array]:
    return {"tokens": jax.random.randint(jax.random.key(1), (rows, SIZE.context + 1), 0, 256, jnp.int32)}


def test_logits_changed_byte_leaves_earlier_positions() -> None:
    tokens = windows(1)["tokens"][:, :-1]
    before = LOGITS(params(), tokens)
    after = LOGITS(params(), tokens.at[0, 5].add(1))
    assert (before[:, :5] == after[:, :5]).all()
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


def test_logits_first_byte_reaches_last_position() -> None:
    tokens = windows(1)["tokens"][:, :-1]
    before = LOGITS(params(), tokens)
    after = LOGITS(params(), tokens.at[0, 0].add(1))
    assert (before[:, -1] != after[:, -1]).any()


def test_logits_rows_do_not_see_each_other() -> None:
    tokens = windows(4)["tokens"][:, :-1]
    together = LOGITS(params(), tokens)
    alone = LOGITS(params(), tokens[2:3])
    # One row and four are different matrix products, so sums are ordered differently.
    np.testing.assert_allclose(together[2:3], alone, rtol=0, atol=1e-5)


def test_logits_of_short_input_are_those_of_its_place_in_a_long_one() -> None:
    tokens = windows(1)["tokens"][:, :-1]
    long = LOGITS(params(), tokens)[:, :3]
    # Shorter sums are ordered differently.
    np.testing.assert_allclose(LOGITS(params(), tokens[:, :3]), long, rtol=0, atol=1e-5)


def test_logits_nothing_kept_is_what_no_block_adds_to() -> None:
    tokens = windows(2)["tokens"][:, :-1]
    kept = jnp.zeros((SIZE.layers, 2, *tokens.shape, SIZE.width), bool)
    found = gpt.logits(params(), tokens, size=SIZE, kept=kept, dropout=0.5)
    silent = {name: jnp.zeros_like(leaf) for name, leaf in params()["layers"].items()}
    assert (found == gpt.logits(params() | {"layers": silent}, tokens, size=SIZE)).all()


def test_logits_what_is_kept_is_divided_by_its_share() -> None:
    tokens = windows(2)["tokens"][:, :-1]
    kept = jnp.ones((SIZE.layers, 2, *tokens.shape, SIZE.width), bool)
    found = gpt.logits(params(), tokens, size=SIZE, kept=kept, dropout=0.5)
    layers = params()["layers"]
    doubled = layers | {"out": 2 * layers["out"], "down": 2 * layers["down"]}
    # Twice is exact, but what is fused with it is not.
    np.testing.assert_allclose(
        found, gpt.logits(params() | {"layers": doubled}, tokens, size=SIZE), rtol=1e-5, atol=1e-6
    )


def test_loss_equal_scores_is_log_of_256() -> None:
    silent = params() | {"byte": jnp.zeros((256, SIZE.width))}
    np.testing.assert_allclose(LOSS(silent, windows(3)), np.log(256), rtol=1e-6)  # float32


def test_loss_is_mean_cross_entropy_of_next_byte() -> None:
    batch = windows(3)
    scores = np.asarray(LOGITS(params(), batch["tokens"][:, :-1]), np.float64)
    log_probabilities = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    targets = np.asarray(batch["tokens"][:, 1:])
    surprise = [
        -log_probabilities[row, place, targets[row, place]] for row in range(3) for place in range(SIZE.context)
    ]
    # float32 against float64
    np.testing.assert_allclose(LOSS(params(), batch), np.mean(surprise), rtol=1e-6)


def test_loss_small_integers_are_the_same_tokens() -> None:
    batch = windows(3)
    assert LOSS(params(), batch) == LOSS(params(), {"tokens": batch["tokens"].astype(jnp.uint8)})


def test_loss_prints_as_loss() -> None:
    assert gpt.make_loss(SIZE).__name__ == "loss"


def test_gradient_strict_promotion_is_finite_everywhere() -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        grads = jax.jit(jax.grad(gpt.make_loss(SIZE)))(params(), windows(3))
    for leaf in jax.tree.leaves(grads):
        assert jnp.isfinite(leaf).all()
        assert (leaf != 0).any()


def test_init_same_key_same_parameters() -> None:
    again = gpt.init(jax.random.key(0), SIZE)
    chex.assert_trees_all_equal(params(), again)


def test_compiled_step_on_devices_equals_reference() -> None:
    loss = gpt.make_loss(SIZE)
    pipeline = sc.update(optax.sgd(0.1)) @ sc.clip(1.0) @ sc.accumulate(2) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    step = sc.compile(pipeline, mesh=jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]))
    state = step.init(params(), seed=0)
    expected, _ = step.reference(state, windows(8))
    found, _ = step(state, windows(8))
    # Sums over rows are ordered differently.
    chex.assert_trees_all_close(jax.device_get(found.params), jax.device_get(expected.params), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", [b"ab", b"longer than the window"])
def test_sample_cold_takes_the_most_probable_byte(prompt: bytes) -> None:
    seen = bytearray(prompt)
    for _ in range(12):
        visible = jnp.array([list(seen[-SIZE.context :])], jnp.int32)
        seen.append(int(LOGITS(params(), visible)[0, -1].argmax()))
    drawn = gpt.sample(params(), prompt, length=12, key=jax.random.key(2), temperature=1e-4, size=SIZE)
    assert drawn == bytes(seen[len(prompt) :])


def test_sample_same_key_same_text() -> None:
    first, again, other = (
        gpt.sample(params(), b"a", length=20, key=jax.random.key(seed), temperature=1.0, size=SIZE)
        for seed in (0, 0, 1)
    )
    assert len(first) == 20
    assert first == again
    assert first != other


def test_sample_empty_prompt_raises() -> None:
    with pytest.raises(sc.ConfigError, match="at least one byte"):
        gpt.sample(params(), b"", length=1, key=jax.random.key(0), temperature=1.0, size=SIZE)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_sample_temperature_not_positive_raises(temperature: float) -> None:
    with pytest.raises(sc.ConfigError, match="above 0"):
        gpt.sample(params(), b"a", length=1, key=jax.random.key(0), temperature=temperature, size=SIZE)


def test_size_uneven_heads_raises() -> None:
    with pytest.raises(sc.ConfigError, match="width must be a multiple of heads"):
        gpt.Size(layers=1, width=16, heads=3, context=8)


def test_size_zero_raises() -> None:
    with pytest.raises(sc.ConfigError, match="at least 1"):
        gpt.Size(layers=0, width=16, heads=2, context=8)
