"""The tests' own means: annotations are checked, and jitted probes make the steps that plain ones make."""

import jax
import optax
import pytest
from beartype.roar import BeartypeCallHintViolation
from conftest import REFERENCE, reference_of_jitted_probes

import stepc as sc
from stepc._language.state import Place, path_matches
from stepc._language.transforms.grad import Grad
from stepc.testing import assert_equal_trees
from stepc.testing.probes import PROBES, probe_batch, probe_params


def test_arguments_of_functions_and_fields_of_classes_are_checked() -> None:
    assert path_matches("a/*", "a/b")
    with pytest.raises(BeartypeCallHintViolation):
        path_matches("a/*", 5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BeartypeCallHintViolation):
        Place(shape="text")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", PROBES)
def test_jitted_probe_makes_the_step_of_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parameters() -> object:
        step = sc.reference(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(PROBES[name]))
        state, _ = step(step.init(probe_params()), probe_batch(8))
        return jax.device_get(state.params)

    assert Grad.reference is reference_of_jitted_probes
    jitted = parameters()
    monkeypatch.setattr(Grad, "reference", REFERENCE)
    assert_equal_trees(jitted, parameters(), tolerance=0.0, of="the steps")
