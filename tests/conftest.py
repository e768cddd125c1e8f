"""Eight simulated devices, strict jax, annotations checked at run time, golden files."""

import fcntl
import functools
import os
import re

from xla_flags import FAST_COMPILES

# Where no GPU is, jax loads its CUDA plugin only if it looks for CPUs alone; otherwise it fails, and says so at length.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{FAST_COMPILES} {os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import pytest
from annotations import check_annotations
from hypothesis import settings

# The doors check what they are given themselves, with errors of ours; test_errors.py tries them with everything
# wrong. What stands behind them is checked by its annotations.
DOORS = (
    "stepc._compiler.normalize",
    "stepc._compiler.step",
    "stepc._compiler.tune",
    "stepc._distributed.start",
    "stepc._language.fields",
    "stepc._language.padding",
    "stepc._language.pipeline",
    "stepc._language.reference",
    "stepc._language.sharding",
    "stepc._language.transforms",
    "stepc._runner.callbacks",
    "stepc._runner.checkpoint",
    "stepc._runner.evaluation",
    "stepc._runner.policies",
    "stepc._runner.run",
    "stepc._runner.throughput",
    "stepc._runner.watchdog",
    "stepc.inspect.budget",
    "stepc.report.page",
    "stepc.report.text",
    "stepc.testing.transforms",
    # hypothesis types `draw` by a protocol that cannot be checked at run time
    "stepc.testing.strategies",
)
PACKAGE = Path(__file__).parent.parent / "stepc"
MODULES = [".".join(("stepc", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE.rglob("*.py")]
check_annotations(
    [name for name in MODULES if not name.startswith(DOORS) and not name.endswith(("__init__", "__main__"))]
)

jax.config.update("jax_numpy_rank_promotion", "raise")
# Strict dtype promotion would be right too, but optax's Adam raises a Python float to the power of an int32 count.

# A compilation takes as long as it takes; what is random is drawn again every run, and printed when it fails.
# A change is judged by the same draws everywhere; new ones are drawn every night, and in the long tests.
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("nightly", deadline=None, print_blob=True)
settings.load_profile("ci")

from stepc._language.semantics import Fn  # noqa: E402, once annotations are checked
from stepc._language.transforms.grad import Grad  # noqa: E402

REFERENCE = Grad.reference


def reference_of_jitted_probes(self: Grad, inner: Fn) -> Fn:
    """The reference, with a jitted probe.

    It calls a loss for each part of the batch, on each device, for each term: op by op that took a fifth of the tests'
    time. The steps that are compared with it are given the probes as they are.
    """
    return REFERENCE(
        self.with_loss(lambda loss: jitted(loss) if loss.__module__ == "stepc.testing.probes" else loss), inner
    )


@functools.cache
def jitted(loss: Callable[..., object]) -> Callable[..., object]:
    """A loss that is jitted, but for the counts that it returns as Python's numbers."""
    call = eqx.filter_jit(loss)
    return functools.wraps(loss)(lambda *args, **options: call(*args, **options))


Grad.reference = reference_of_jitted_probes

GOLDEN = Path(__file__).parent / "golden"

pytest_plugins = ["faults.results", "faults.zygote"]  # the table of faults; processes that begin at once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regold", action="store_true", help="write the golden files again; review the diff")


def golden_texts(text: str) -> dict[str, str]:
    """The sections of a golden file: `## name`, then the text up to the next `## `."""
    _, *sections = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {name: section.rstrip("\n") for name, section in zip(sections[::2], sections[1::2], strict=True)}


def rewrite_golden(path: Path, name: str, text: str) -> None:
    """Replace one section and leave the others, locked against tests that run side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        texts = golden_texts(file.read()) | {name: text.rstrip("\n")}
        file.truncate(0)
        file.write("\n".join(f"## {name}\n{text}\n" for name, text in texts.items()))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Compare a text with the section `name` of tests/golden/<group>.txt; `--regold` rewrites that section."""

    def compare(group: str, name: str, text: str) -> None:
        path = GOLDEN / f"{group}.txt"
        assert not re.search("^## ", text, flags=re.MULTILINE), "the text would begin a section of its own"
        if request.config.getoption("--regold"):
            rewrite_golden(path, name, text)
        else:
            known = golden_texts(path.read_text()).get(name)
            assert text.rstrip("\n") == known, f"{path.name}, {name}: run pytest --regold and review the diff"

    return compare


@pytest.fixture(autouse=True)
def no_more_steps_in_flight() -> object:
    """Un-awaited steps on simulated devices abort the process: no test leaves one behind."""
    yield
    jax.effects_barrier()


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first simulated devices."""
    shape = tuple(sizes.values())
    count = 1
    for size in shape:
        count *= size
    return jax.make_mesh(shape, tuple(sizes), devices=jax.devices()[:count])
