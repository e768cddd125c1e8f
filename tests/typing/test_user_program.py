"""A user's program type-checks under pyright and mypy: `py.typed` says so."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("user_program.py")
ROOT = PROGRAM.parent.parent.parent


@pytest.mark.parametrize(
    ("checker", "options"),
    [
        ("pyright", ()),
        # Silent about the packages it follows, and about optax, which has no py.typed: this is about our names.
        ("mypy", ("--strict", "--config-file=", "--follow-imports=silent", "--disable-error-code=import-untyped")),
    ],
)
def test_user_program_has_no_type_error(checker: str, options: tuple[str, ...], tmp_path: Path) -> None:
    if find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed: pip install -e '.[dev]'")
    cache = (f"--cache-dir={tmp_path}",) if checker == "mypy" else ()
    command = [sys.executable, "-m", checker, *options, *cache, str(PROGRAM)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
