"""The example steps, each compared with the same step by hand, run as a program, and told of in docs/steps.md."""

import importlib
import inspect
import re
import runpy
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from steps_by_hand import KEY, OF_PARTS, OF_THE_BATCH, Found, rollout

import stepc as sc

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "steps.md"
FOLDER = ROOT / "examples" / "steps"
BY_HAND = {**OF_THE_BATCH, **OF_PARTS}
NUM_STEPS = 4
SPLITS = [(1, 1), (4, 1), (4, 8)]


class Run(NamedTuple):
    """What some steps of an example were compared with by hand.

    Args:
      of_largest: by name and path, the largest difference, as a part of the largest number in the tree.
      of_leaf: the same, as a part of the largest number in the leaf.
      state: the last one.
      collectives: of the compiled program.
    """

    of_largest: dict[str, float]
    of_leaf: dict[str, float]
    state: sc.State
    collectives: sc.inspect.Collectives


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"examples.steps.{name}")


@cache
def found_by_hand(name: str, k: int, devices: int) -> list[Found]:
    if name in OF_PARTS:
        return list(islice(OF_PARTS[name](k, devices), NUM_STEPS))
    return list(islice(OF_THE_BATCH[name](), NUM_STEPS)) if (k, devices) == (1, 1) else found_by_hand(name, 1, 1)


@cache
def run_of(name: str, k: int, devices: int) -> Run:
    example = module_of(name)
    step, made = sc.compile(example.pipeline(k=k), mesh=mesh_of(data=devices)), example.init(KEY)
    state = step.init(made[0], model_state=made[1]) if isinstance(made, tuple) else step.init(made)
    batch = rollout() if name == "ppo" else example.batch()
    collectives = step.lower(state, batch).compile().collectives()
    of_largest: dict[str, float] = {}
    of_leaf: dict[str, float] = {}
    for number, found in enumerate(found_by_hand(name, k, devices)):
        state, metrics = step(state, batch)
        got = {"params": state.params, "model_state": state.model_state, **state.slots, **metrics}
        for what, hand in found.items():
            for path, difference, of_tree, own in differences(got[what], hand):
                at = f"step {number + 1}, {what}/{path}".rstrip("/")
                of_largest[at], of_leaf[at] = difference / of_tree, difference / own
    return Run(of_largest, of_leaf, state, collectives)


def differences(got: Any, hand: Any) -> Iterator[tuple[str, float, float, float]]:
    """Of each leaf: its path, the difference, the largest float of the tree, and the largest number of the leaf."""
    wanted = [numbers(leaf) for leaf in jax.tree.leaves(hand)]
    of_tree = max((np.abs(leaf).max() for leaf in wanted if leaf.dtype.kind == "f"), default=0.0) or 1.0
    for (keys, leaf), two in zip(jax.tree_util.tree_leaves_with_path(got), wanted, strict=True):
        one, path = numbers(leaf), jax.tree_util.keystr(keys, simple=True, separator="/")
        if two.dtype.kind == "f":
            difference = np.abs(one - two).max()
        else:  # whole numbers and keys are equal, or they are wrong
            difference = 0.0 if np.array_equal(one, two) else np.inf
        yield path, float(difference), float(of_tree), float(np.abs(two).max() or 1.0)


def numbers(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


@pytest.mark.parametrize(("k", "devices"), [*SPLITS, pytest.param(1, 8, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", BY_HAND)
def test_example_equals_the_step_by_hand(name: str, k: int, devices: int) -> None:
    run = run_of(name, k, devices)
    assert run.of_largest
    assert {at: one for at, one in run.of_largest.items() if not one <= 1e-6} == {}
    # Adam divides by the root of a small number, so a leaf that starts from zero differs by more of its own. With XLA's
    # own flags, one program rounds to float16 (1e-3) less often than another.
    allowed = 1e-3 if name == "fp16_loss_scale" else 1e-4
    assert {at: one for at, one in run.of_leaf.items() if not one <= allowed} == {}


@pytest.mark.parametrize("name", BY_HAND)
def test_example_prints_the_loss_of_its_steps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(re.findall(r"loss -?\d", printed)) >= 10
    assert "nan" not in printed


@pytest.mark.parametrize(
    ("name", "num_trained"), [("qlora", 2), ("frozen_encoder", 2), ("frozen_embeddings", 3), ("lora", 4)]
)
def test_frozen_leaves_have_no_optimizer_state(name: str, num_trained: int) -> None:
    state = run_of(name, 4, 8).state
    assert len(jax.tree.leaves(state.trained)) == num_trained < len(jax.tree.leaves(state.params))
    assert len(jax.tree.leaves(state.opt_state)) == 2 * num_trained + 1  # two moments of each, and a count


def test_scale_is_halved_until_the_gradient_is_finite() -> None:
    skipped = [bool(found["skipped"]) for found in found_by_hand("fp16_loss_scale", 4, 8)]
    assert skipped == sorted(skipped, reverse=True)
    assert True in skipped and False in skipped


def test_every_example_is_compared_and_told_of() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert names == set(BY_HAND) == set(rows_of_table())


@pytest.mark.parametrize("name", BY_HAND)
def test_example_is_short(name: str) -> None:
    assert 20 <= len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60


def rows_of_table() -> dict[str, list[str]]:
    """The cells of each row of the table in the page, by the name of the example."""
    rows = re.findall(r"^\| \[(\w+)\]\(\S+\) \| (.*) \|$", PAGE.read_text(), flags=re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def lines_in(function: Any) -> int:
    while isinstance(function, partial):
        function = function.func
    return len(inspect.getsource(function).splitlines())


def collectives_in(rows: sc.inspect.Collectives) -> str:
    """How many run in a step, by kind, and their bytes on each device."""
    texts = []
    for kind in dict.fromkeys(row.kind for row in rows):
        known = [row for row in rows if row.kind == kind and row.executions is not None]
        num = sum(row.executions or 0 for row in known)
        size = sum((row.executions or 0) * row.bytes for row in known)
        texts += [f"{num} {kind}{'s' * (num > 1)}, {size:,} bytes"] if known else []
        searching = {f"{row.bytes:,}" for row in rows if row.kind == kind and row.executions is None}
        texts += [f"1 more an evaluation, {size} bytes" for size in searching]
    return "; ".join(texts)


@pytest.mark.parametrize("name", BY_HAND)
def test_table_says_what_an_example_takes(name: str, request: pytest.FixtureRequest) -> None:
    lines = len((FOLDER / f"{name}.py").read_text().splitlines())
    counts = [str(lines), str(lines_in(module_of(name).pipeline)), str(lines_in(BY_HAND[name]))]
    collectives = collectives_in(run_of(name, 4, 8).collectives)
    if request.config.getoption("--regold"):
        largest = max(max(run_of(name, *split).of_largest.values()) for split in SPLITS)
        row = f"| [{name}](../examples/steps/{name}.py) | {' | '.join([*counts, f'{largest:.0e}', collectives])} |"
        PAGE.write_text(re.sub(rf"^\| \[{name}\].*$", row, PAGE.read_text(), flags=re.MULTILINE))
    *written, difference, told = rows_of_table()[name]
    assert [*written, told] == [*counts, collectives]
    assert float(difference) <= 1e-6
