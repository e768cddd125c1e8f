"""Reading a checkpoint without a run: all of it or some leaves, like a state, like parameters, or like nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import mesh_of
from faults.plan import FaultPlan, batch_of, by_a_plain_loop, digest, fresh, step
from jax.sharding import NamedSharding, PartitionSpec

import stepc as sc


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for steps in (3, 5):
        sc.run(step(), fresh(), FaultPlan().batches(20), steps=steps, checkpoint=sc.Checkpoints(folder, every=100))
    return folder


@pytest.mark.parametrize(("number", "steps"), [(None, 5), (5, 5), (3, 3)])
@pytest.mark.parametrize("is_shape", [False, True])
def test_restored_state_is_the_saved_one(saved: Path, number: int | None, steps: int, is_shape: bool) -> None:
    like = jax.eval_shape(fresh) if is_shape else fresh()
    state = sc.restore(saved, like=like, step=number)
    assert digest(state) == digest(by_a_plain_loop(list(range(1, steps + 1))))
    state, _ = step()(state, batch_of(steps + 1))  # it trains on
    assert digest(state) == digest(by_a_plain_loop(list(range(1, steps + 2))))


def test_restored_leaves_can_be_donated(tmp_path: Path) -> None:
    sizes = range(1000, 1064)  # numpy aligns some of them as jax needs it to take them without a copy
    state = {"step": jnp.zeros((), jnp.int32), "leaves": [jnp.full(size, 1.5) for size in sizes]}
    keep = sc.Checkpoints(tmp_path, every=1)
    sc.run(lambda state, batch: (state, {"loss": jnp.float32(0)}), state, [{"x": np.zeros(1)}], checkpoint=keep)
    found = sc.restore(tmp_path, like=state)["leaves"]
    before = [leaf.unsafe_buffer_pointer() for leaf in found]
    after = jax.jit(lambda leaves: [leaf + 1 for leaf in leaves], donate_argnums=0)(found)
    assert [leaf.unsafe_buffer_pointer() for leaf in after] == before


def test_compressed_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = ocp.PyTreeCheckpointHandler
    state = {"zeros": jnp.zeros(100_000)}
    sizes = []
    for name, options in (("plain", {}), ("compressed", {"use_compression": True})):  # as those of an older stepc
        monkeypatch.setattr(
            ocp, "PyTreeCheckpointHandler", lambda options=options, **given: handler(**{**given, **options})
        )
        keep = sc.Checkpoints(tmp_path / name, every=1)
        sc.run(lambda state, batch: (state, {"loss": jnp.float32(0)}), state, [{"x": np.zeros(1)}], checkpoint=keep)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / name).rglob("*") if file.is_file()))
        np.testing.assert_array_equal(sc.restore(tmp_path / name)["zeros"], state["zeros"])
    assert sizes[0] > 400_000 > 10 * sizes[1]


def test_only_what_is_named_is_read(saved: Path) -> None:
    like = fresh()
    state = sc.restore(saved, like=like, only=["params/**", "step"])
    expected = by_a_plain_loop([1, 2, 3, 4, 5])
    np.testing.assert_array_equal(np.asarray(state.params["w"]), np.asarray(expected.params["w"]))
    assert int(state.step) == 5 and state.rng is like.rng
    assert state.opt_state[0].mu["w"] is like.opt_state[0].mu["w"]
    shapes = jax.eval_shape(fresh)
    assert sc.restore(saved, like=shapes, only="params/**").opt_state == shapes.opt_state


def test_leaves_are_placed_as_those_of_like(saved: Path) -> None:
    sharding = NamedSharding(mesh_of(data=3), PartitionSpec("data"))
    like: Any = {"params": {"w": jax.ShapeDtypeStruct((3,), np.float32, sharding=sharding)}}
    found = sc.restore(saved, like=like)["params"]["w"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(np.asarray(found), np.asarray(by_a_plain_loop([1, 2, 3, 4, 5]).params["w"]))


def test_damaged_checkpoint_is_passed_over_unless_it_is_asked_for(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "5" / "state")
    assert digest(sc.restore(tmp_path, like=fresh())) == digest(by_a_plain_loop([1, 2, 3]))
    with pytest.raises(sc.CheckpointError, match="No checkpoint in .* can be read") as raised:
        sc.restore(tmp_path, like=fresh(), step=5)
    assert raised.value.step == 5


def test_restore_while_a_run_goes_on(tmp_path: Path) -> None:
    found: list[str] = []

    def hook(number: int, metrics: Any, snapshot: Any) -> None:
        found.append(digest(sc.restore(tmp_path, like=fresh())))

    keep = sc.Checkpoints(tmp_path, every=2, keep=9)
    sc.run(step(), fresh(), FaultPlan().batches(2), checkpoint=keep)
    sc.run(step(), fresh(), FaultPlan().batches(4), checkpoint=keep, hooks=[(3, hook)])
    assert found == [digest(by_a_plain_loop([1, 2]))]


def test_restore_that_does_not_fit_names_every_leaf_and_what_there_is(saved: Path) -> None:
    wrong: Any = {"params": {"w": jnp.zeros(4), "b": jnp.zeros(1)}}
    with pytest.raises(sc.ResumeError) as raised:
        sc.restore(saved, like=wrong)
    assert str(raised.value) == (
        "The checkpoint of step 5 does not fit `like`.\n\n"
        "  params/b  saved nothing, `like` has float32[1]\n"
        "  params/w  saved float32[3], `like` has float32[4]\n"
        "  there is  params, opt_state (3 leaves), step, rng"
    )


def weights_after_five() -> np.ndarray:
    return np.asarray(by_a_plain_loop([1, 2, 3, 4, 5]).params["w"])


@pytest.mark.parametrize("only", ["**", "params/**"])
@pytest.mark.parametrize("is_shape", [False, True])
def test_parameters_alone_are_those_of_the_state(saved: Path, is_shape: bool, only: str) -> None:
    like = {"w": np.zeros(3, np.float32)}
    found = sc.restore(saved, like=jax.eval_shape(lambda: like) if is_shape else like, only=only)
    np.testing.assert_array_equal(np.asarray(found["w"]), weights_after_five())


def test_dict_of_fields_has_them_as_they_are_there(saved: Path) -> None:
    found = sc.restore(saved, like={"params": {"w": np.zeros(3, np.float32)}, "step": np.zeros((), np.int32)})
    np.testing.assert_array_equal(np.asarray(found["params"]["w"]), weights_after_five())
    assert int(found["step"]) == 5


def test_without_like_the_leaves_are_in_dicts(saved: Path) -> None:
    found = sc.restore(saved)
    expected = by_a_plain_loop([1, 2, 3, 4, 5])
    assert found.keys() == {"params", "opt_state", "step", "rng"}
    np.testing.assert_array_equal(np.asarray(found["params"]["w"]), np.asarray(expected.params["w"]))
    np.testing.assert_array_equal(np.asarray(found["opt_state"]["0"]["mu"]["w"]), expected.opt_state[0].mu["w"])
    assert jax.random.key_data(found["rng"]).tolist() == jax.random.key_data(expected.rng).tolist()
    assert sc.restore(saved, only="params/**", step=3).keys() == {"params"}


def test_keys_that_hold_a_slash_come_back_as_they_were(tmp_path: Path) -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean((rows["x"] @ params["mlp/~/linear"]["w"]) ** 2)

    ours = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))
    state = ours.init({"mlp/~/linear": {"w": np.ones(3, np.float32)}})
    run = sc.run(ours, state, [batch_of(1)], checkpoint=sc.Checkpoints(tmp_path, every=1))
    found = sc.restore(tmp_path, only="params/**")
    np.testing.assert_array_equal(found["params"]["mlp/~/linear"]["w"], run.state.params["mlp/~/linear"]["w"])


def test_best_checkpoint_is_restored_by_that_name(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, float("nan")])
    sc.run(
        step(), fresh(), FaultPlan().batches(8),
        eval=sc.Eval(2, lambda state, batch: {"loss": next(values)}, [batch_of(1)]),
        checkpoint=sc.Checkpoints(tmp_path, every=2, keep=9, best=("eval/loss", "min")),
    )  # fmt: skip
    assert digest(sc.restore(tmp_path, like=fresh(), step="best")) == digest(by_a_plain_loop([1, 2, 3, 4]))
    shutil.rmtree(tmp_path / "4" / "meta")
    assert digest(sc.restore(tmp_path, like=fresh(), step="best")) == digest(by_a_plain_loop([1, 2, 3, 4, 5, 6]))


MISTAKES: dict[str, tuple[type[Exception], Callable[[Path], Any], str]] = {
    "nothing there": (
        sc.CheckpointError,
        lambda saved: sc.restore(saved / "none"),
        "There is no checkpoint in DIR/none.\n\n  steps  none",
    ),
    "another step": (
        sc.CheckpointError,
        lambda saved: sc.restore(saved, step=4),
        "There is no checkpoint of step 4 in DIR.\n\n  steps  5, 3",
    ),
    "one checkpoint": (
        sc.CheckpointError,
        lambda saved: sc.restore(saved / "5"),
        "There is no checkpoint in DIR/5.\n\n  steps  none\n\n"
        "  This is one checkpoint of a run: `sc.restore('DIR', step=5)`.",
    ),
    "the folder of all runs": (
        sc.CheckpointError,
        lambda saved: sc.restore(saved.parent),
        "There is no checkpoint in PARENT.\n\n  steps  none\n\n  There are checkpoints in DIR.",
    ),
    "no best": (
        sc.CheckpointError,
        lambda saved: sc.restore(saved, step="best"),
        "The run that saved in DIR did not say which checkpoint is the best.\n\n"
        "  steps    5, 3\n  metrics  grad_norm, loss\n\n"
        '  Give the run `sc.Checkpoints(…, best=("eval/loss", "min"))`, or name a step here.',
    ),
    "pattern of no leaf": (
        sc.ConfigError,
        lambda saved: sc.restore(saved, like=fresh(), only="w"),
        "Invalid arguments to `restore`.\n\n  only  expected a pattern that matches a leaf of `like`, got 'w'\n\n"
        "  Did you mean '**/w'?",
    ),
    "pattern of no leaf of the checkpoint": (
        sc.ConfigError,
        lambda saved: sc.restore(saved, only=["params/**", "model_state/**"]),
        "Invalid arguments to `restore`.\n\n"
        "  only  expected a pattern that matches a leaf of the checkpoint, got 'model_state/**'\n\n"
        "  The paths are 'params/w', 'opt_state/0/count', 'opt_state/0/mu/w', 'opt_state/0/nu/w', 'step', 'rng'.",
    ),
    "like of functions": (
        sc.FieldTypeError,
        lambda saved: sc.restore(saved, like={"w": np.zeros(3), "act": [abs]}),
        "Invalid arguments to `restore`.\n\n  like act/0  expected an array, or its shape, got <built-in function abs>",
    ),
    "step of another kind": (
        sc.ConfigError,
        lambda saved: sc.restore(saved, step="latest", only=3),  # type: ignore[arg-type]
        "Invalid arguments to `restore`.\n\n  only  expected a pattern, or a list of patterns, got 3\n"
        "  step  expected a non-negative integer, \"best\" or None, got 'latest'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_refused_in_these_words(saved: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "runs" / "first")
    kind, mistake, text = MISTAKES[name]
    with pytest.raises(kind) as raised:
        mistake(folder)
    assert str(raised.value).replace(str(folder), "DIR").replace(str(folder.parent), "PARENT") == text
