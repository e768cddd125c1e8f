"""The models under test: parameters, a batch, a factory of losses, the optimizer. It does not know what is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.gpt import model as gpt

Loss: TypeAlias = Callable[[Any, Any], jax.Array]  # Any: trees of parameters and of rows


@dataclass(frozen=True)
class Model:
    """What a step needs. `make_loss` returns a new function each time, so that no cache knows it."""

    name: str
    make_loss: Callable[[], Loss]
    params: Any  # Any: a tree of arrays
    batch: Any  # Any: a tree of host arrays

    @property
    def num_params(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def adamw() -> optax.GradientTransformation:
    """A new optimizer. Its epsilon is 1e-5 and not 1e-8, so that variants can be compared after one step.

    Adam's first step is g / (|g| + epsilon): with 1e-8, a gradient that is 0 but for rounding becomes a whole step.
    """
    return optax.adamw(1e-3, eps=1e-5)


def mlp(widths: tuple[int, ...], *, rows: int) -> Model:
    """Matrices with ReLU between them, and a squared error."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    params = [
        {"kernel": jnp.asarray(normal(before, after) * (2 / before) ** 0.5), "bias": jnp.zeros(after)}
        for before, after in pairwise(widths)
    ]
    batch = {"x": normal(rows, widths[0]), "y": normal(rows, widths[-1])}
    return Model(f"MLP {'-'.join(map(str, widths))}, {rows} rows", _mlp_loss, params, batch)


def small_gpt(size: gpt.Size, *, rows: int, num_tokens: int = gpt.NUM_BYTES) -> Model:
    """The GPT of the demo, with an embedding table of `num_tokens` rows instead of 256 if asked."""
    key, table = jax.random.split(jax.random.key(0))
    params = dict(gpt.init(key, size))
    if num_tokens != gpt.NUM_BYTES:
        params["byte"] = 0.02 * jax.random.normal(table, (num_tokens, size.width))
    tokens = np.random.default_rng(0).integers(0, num_tokens, (rows, size.context + 1))
    what = f"{size.layers} layers, width {size.width}, context {size.context}, {num_tokens} tokens, {rows} rows"
    return Model(f"GPT {what}", lambda: gpt.make_loss(size), params, {"tokens": tokens.astype(np.int32)})


def resnet(width: int, *, blocks: int, size: int, rows: int) -> Model:
    """Residual blocks of two 3 x 3 convolutions with group norms, on square images, and a cross-entropy of ten classes.

    Group norms, since the statistics of batch norms depend on which rows share a microbatch.
    """
    rng = np.random.default_rng(0)

    def conv(inputs: int) -> dict[str, jax.Array]:
        kernel = rng.standard_normal((3, 3, inputs, width)) * (2 / (9 * inputs)) ** 0.5
        return {"kernel": jnp.asarray(kernel, jnp.float32), "scale": jnp.ones(width), "bias": jnp.zeros(width)}

    params = {
        "stem": conv(3),
        "blocks": [{"first": conv(width), "second": conv(width)} for _ in range(blocks)],
        "head": jnp.asarray(rng.standard_normal((width, 10)) * width**-0.5, jnp.float32),
    }
    images = rng.standard_normal((rows, size, size, 3)).astype(np.float32)
    batch = {"image": images, "label": rng.integers(0, 10, rows).astype(np.int32)}
    return Model(
        f"ResNet, {blocks} blocks of {width} channels, {size} x {size}, {rows} rows", _resnet_loss, params, batch
    )


def _resnet_loss() -> Loss:
    def normed(conv: Any, images: jax.Array) -> jax.Array:
        found = jax.lax.conv_general_dilated(
            images, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        groups = found.reshape(*found.shape[:3], 4, -1)
        mean = groups.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(groups - mean).mean((1, 2, 4), keepdims=True)
        return ((groups - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(found.shape) * conv["scale"] + conv["bias"]

    def loss(params: Any, batch: Any) -> jax.Array:
        images = jax.nn.relu(normed(params["stem"], batch["image"]))
        for block in params["blocks"]:
            images = jax.nn.relu(images + normed(block["second"], jax.nn.relu(normed(block["first"], images))))
        scores = images.mean((1, 2)) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"]).mean()

    return loss


def _mlp_loss() -> Loss:
    def loss(params: Any, batch: Any) -> jax.Array:
        *inner, last = params
        hidden = batch["x"]
        for layer in inner:
            hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
        return jnp.square(hidden @ last["kernel"] + last["bias"] - batch["y"]).mean()

    return loss
