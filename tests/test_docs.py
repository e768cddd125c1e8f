"""What the documents say is run: doctests, the README's Python, the notebooks."""

import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import optax
import pytest
from catalogue import PROBES
from nbclient import NotebookClient

import stepc as sc

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "stepc").rglob("*.py"))
    if path.name != "__main__.py"
]


def loss(params: Any, rows: Any) -> jax.Array:
    """The loss of the examples: it prints as they write it."""
    return PROBES["over_rows"](params, rows)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    names = {**vars(sc), **vars(sc.inspect), **vars(sc.testing), "sc": sc, "optax": optax, "jax": jax}
    names |= {"jnp": jnp, "np": np, "loss": loss, "P": jax.sharding.PartitionSpec}
    # Examples are a user's code, not the module's: what they write is quoted as a user's.
    result = doctest.testmod(importlib.import_module(name), extraglobs={**names, "__name__": "__main__"})
    assert result.failed == 0


def blocks_of_readme() -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_python_of_the_readme_runs_from_top_to_bottom_in_a_new_process(tmp_path: Path) -> None:
    code = "\n".join(blocks_of_readme())
    assert "sc.compile" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("default")  # those of the notebook machinery are not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_to_its_last_assertion(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "assert" in code[-1].source
    assert all(len(cell.source.splitlines()) <= 18 for cell in code)
    stored = [output_of(cell) for cell in code]
    assert any(stored), "a notebook is stored with its outputs"
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    # The order of transforms, the plan and the errors print alike everywhere; only bytes of memory belong to a version.
    told = [output_of(cell) for cell in code]
    assert [text for text in told if "temporaries" not in text] == [
        text for text in stored if "temporaries" not in text
    ]


def output_of(cell: nbformat.NotebookNode) -> str:
    text = "".join(output.get("text", "") for output in cell.outputs if output.get("name") != "stderr")
    return re.sub(r"(lower\.py):\d+", r"\1:N", text)  # the line of ours that a collective stands in may move
