"""Eight simulated devices, strict jax, annotations checked at run time, golden files."""

import os

# Where no GPU is, jax loads its CUDA plugin only if it looks for CPUs alone; otherwise it fails, and says so at length.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# The doors check what they are given themselves, with errors of ours; test_errors.py tries them with everything
# wrong. What stands behind them is checked by its annotations.
DOORS = (
    "stepc._compiler.normalize",
    "stepc._compiler.step",
    "stepc._distributed.start",
    "stepc._language.fields",
    "stepc._language.padding",
    "stepc._language.pipeline",
    "stepc._language.reference",
    "stepc._language.sharding",
    "stepc._language.transforms",
    "stepc._runner.checkpoint",
    "stepc._runner.policies",
    "stepc._runner.run",
    "stepc.inspect.budget",
    "stepc.testing.transforms",
    # hypothesis types `draw` by a protocol that cannot be checked at run time
    "stepc.testing.strategies",
)
PACKAGE = Path(__file__).parent.parent / "stepc"
MODULES = [".".join(("stepc", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE.rglob("*.py")]
install_import_hook(
    [name for name in MODULES if not name.startswith(DOORS) and not name.endswith(("__init__", "__main__"))],
    "beartype.beartype",
)

jax.config.update("jax_numpy_rank_promotion", "raise")
# Strict dtype promotion would be right too, but optax's Adam raises a Python float to the power of an int32 count.

# A compilation takes as long as it takes; what is random is drawn again every run, and printed when it fails.
settings.register_profile("ci", deadline=None, print_blob=True)
settings.load_profile("ci")

GOLDEN = Path(__file__).parent / "golden"

pytest_plugins = ["faults.results", "faults.zygote"]  # the table of faults; processes that begin at once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regold", action="store_true", help="write the golden files again; review the diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a whole text with a file in tests/golden; `--regold` writes it."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--regold"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        assert text + "\n" == path.read_text(), f"{path.name}: run pytest --regold and review the diff"

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
