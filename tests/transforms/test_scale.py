"""`scale` multiplies the gradient and leaves the metrics."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params

import stepc as sc


@pytest.mark.parametrize("c", [0, -2.0, 0.5])
def test_scale_multiplies_the_gradient_and_leaves_the_loss(c: float) -> None:
    params, batch = probe_params(), probe_batch(8)
    grad = sc.grad(PROBES["over_rows"])
    plain = sc.reference(sc.update(optax.sgd(1.0)) @ grad)
    scaled = sc.reference(sc.update(optax.sgd(1.0)) @ sc.scale(c) @ grad)
    start = {name: jnp.asarray(leaf) for name, leaf in params.items()}
    one, one_metrics = plain(plain.init(start), batch)
    two, two_metrics = scaled(scaled.init(start), batch)
    assert two_metrics["loss"] == one_metrics["loss"]
    for name, leaf in start.items():
        assert np.array_equal(two.params[name] - leaf, c * (one.params[name] - leaf))
