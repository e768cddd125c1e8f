"""A new project: three files that train, and a test that holds what a step costs. It knows no step."""

import importlib.util
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from stepc.errors import ConfigError

# The library of each model: the package that pip installs, and the module that Python imports.
LIBRARIES = MappingProxyType(
    {
        "nnx": ("flax", "flax"),
        "linen": ("flax", "flax"),
        "equinox": ("equinox", "equinox"),
        "haiku": ("dm-haiku", "haiku"),
    }
)
FILES = ("model.py", "step.py", "train.py", "test_step.py")


def write_project(directory: Path, model: str) -> list[Path]:
    """Write the files of a project and return their paths. Errors: ConfigError if the directory holds anything."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file.", suggestion="Name a directory that is new, or empty.")
    if directory.is_dir() and (held := sorted(one.name for one in directory.iterdir())):
        more = f" and {len(held) - 5} more" if len(held) > 5 else ""
        raise ConfigError(
            f"The directory {directory} is not empty.",
            facts=(("holds", ", ".join(held[:5]) + more),),
            suggestion="Name a directory that is new, or empty.",
        )
    sources = files("stepc._projects")
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = f"model_{model}.py.txt" if name == "model.py" else f"{name}.txt"
            written.append(directory / name)
            written[-1].write_text((sources / source).read_text())
    except OSError as error:
        raise ConfigError(f"Cannot write in {directory}: {error.strerror}.") from error
    return written


def missing_packages(model: str) -> list[str]:
    """What the project needs and is not installed, as pip names it."""
    package, module = LIBRARIES[model]
    needed = {package: module, "stepc[demo]": "rich", "stepc[checkpoint]": "orbax", "pytest": "pytest"}
    return [name for name, module in needed.items() if importlib.util.find_spec(module) is None]
