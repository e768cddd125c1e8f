"""The documentation is true: doctests, the code and the printed outputs of README.md and docs/, the notebooks.

The ```python blocks of a page run in one process, after the first block of README.md. A plain ``` block below one is
what it prints; `…` stands for what is left out of a line, or for lines if it is alone. Other languages are not run:
```text is illustrative, ```py is code that cannot run here. `pytest --regold` rewrites outputs, in notebooks too.
"""

import difflib
import doctest
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import optax
import pytest
from catalogue import PROBES, over_pairs
from nbclient import NotebookClient

import stepc as sc
from stepc._core.laws import LAWS
from stepc.testing.probes import encoding

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "stepc").rglob("*.py"))
    if path.name != "__main__.py"
]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", flags=re.DOTALL | re.MULTILINE)
END_OF_BLOCK = "\x1e\n"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")


def loss(params: Any, rows: Any) -> jax.Array:
    """The loss of the examples: it prints as they write it."""
    return PROBES["over_rows"](params, rows)


def encode(params: Any, rows: Any) -> Any:
    return encoding(params, rows)


def head(params: Any, z: Any) -> jax.Array:
    return over_pairs(params, z)


def norms(grads: Any, params: Any) -> Any:
    return {"norms": jnp.stack([jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(grads)])}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    names = {**vars(sc), **vars(sc.inspect), **vars(sc.testing), "sc": sc, "optax": optax, "jax": jax}
    names |= {
        "jnp": jnp,
        "np": np,
        "loss": loss,
        "norms": norms,
        "encode": encode,
        "head": head,
        "P": jax.sharding.PartitionSpec,
    }
    # Examples are a user's code, not the module's: what they write is quoted as a user's.
    result = doctest.testmod(importlib.import_module(name), extraglobs={**names, "__name__": "__main__"})
    assert result.failed == 0


@dataclass(frozen=True)
class Block:
    """A ```python block, and the span and text of the output below it, if there is one."""

    code: str
    output: str | None = None
    span: tuple[int, int] = (0, 0)


def blocks_of(text: str) -> list[Block]:
    fences = list(FENCE.finditer(text))
    blocks = []
    for fence, after in zip_longest(fences, fences[1:]):
        if fence["language"] != "python":
            continue
        if after is not None and after["language"] == "" and not text[fence.end() : after.start()].strip():
            blocks.append(Block(fence["body"], after["body"], after.span("body")))
        else:
            blocks.append(Block(fence["body"]))
    assert len([fence for fence in fences if not fence["language"]]) == len([one for one in blocks if one.output])
    return blocks


def printed_by(blocks: list[Block], directory: Path) -> list[str]:
    """What each block prints, in one new process, from a file: errors and pipelines quote the user's source."""
    script = directory / "train.py"
    script.write_text("".join(f"{block.code}print(end={END_OF_BLOCK!r}, flush=True)\n" for block in blocks))
    done = subprocess.run([sys.executable, script.name], capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr
    *printed, rest = done.stdout.split(END_OF_BLOCK)
    assert not rest and len(printed) == len(blocks)
    return ["\n".join(line.rstrip() for line in text.splitlines()) + "\n" for text in printed]


def matches(expected: str, printed: str) -> bool:
    lines = [
        r"(?:[^\n]*\n)*?" if line.strip() == "…" else r"[^\n]*?".join(map(re.escape, line.split("…"))) + r"\n"
        for line in expected.splitlines()
    ]
    return re.fullmatch("".join(lines), printed) is not None


def elided_alike(expected: str, printed: str) -> str:
    """`printed`, with as much left out as in `expected`: each line of it becomes the most similar line printed."""
    remaining, lines = printed.splitlines(), []
    if "…" not in expected:
        return printed
    for line in expected.splitlines():
        if line.strip() == "…":
            lines.append(line)
            continue
        similar = [difflib.SequenceMatcher(None, line, one).ratio() for one in remaining]
        if not similar or max(similar) < 0.4:
            continue
        index = similar.index(max(similar))
        found = remaining[index]
        remaining = remaining[index + 1 :]
        if matches(f"{line}\n", f"{found}\n"):
            found = line
        elif line.endswith("…") and len(found) > len(line):
            found = found[: len(line) - 1].rpartition(" ")[0] + " …"
        lines.append(found)
    return "\n".join(lines) + "\n"


def test_elided_output_is_compared_and_rewritten() -> None:
    printed = "plan of a\n\nmesh\n  data=8\n\nbatch\n  rows along data\nstate: 3 leaves, 12 bytes\n"
    assert matches("plan of a\n…\n  data=8\n…\nstate: … bytes\n", printed)
    assert not matches("plan of a\n…\n  data=4\n…\n", printed)
    assert not matches("plan of a\n", printed)
    assert elided_alike("plan of b\n…\n  data=4\n…\nstate: 3 …\n", printed) == (
        "plan of a\n…\n  data=8\n…\nstate: 3 …\n"
    )
    assert elided_alike("anything\n", printed) == printed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_runs_and_prints_what_it_shows(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text()
    blocks = blocks_of(text)
    if not blocks:
        return
    first = [] if path == README else [Block(blocks_of(README.read_text())[0].code)]
    printed = printed_by([*first, *blocks], tmp_path)[len(first) :]
    compared = [(one, out) for one, out in zip(blocks, printed, strict=True) if one.output is not None]
    if request.config.getoption("--regold"):
        for block, out in reversed(compared):
            if block.output is not None and not matches(block.output, out):
                start, end = block.span
                text = text[:start] + elided_alike(block.output, out) + text[end:]
        path.write_text(text)
        compared = list(zip([one for one in blocks_of(text) if one.output], [out for _, out in compared], strict=True))
    for block, out in compared:
        assert block.output is not None
        assert matches(block.output, out), f"{path.name} shows\n{block.output}\nand this was printed:\n{out}"


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*/README.md"), ROOT / ".github" / "CONTRIBUTING.md"], ids=str)
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text()):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_page_of_laws_has_each_law_as_the_code_has_it() -> None:
    rows = [f"| `{law.name}` | `{law.formula}` | {law.condition} | {law.reason} |" for law in LAWS]
    page = (ROOT / "docs" / "laws.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


def test_readme_is_short() -> None:
    assert 5_000 <= len(README.read_bytes()) <= 7_500


@pytest.mark.filterwarnings("default")  # those of the notebook machinery are not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_to_its_last_assertion(path: Path, request: pytest.FixtureRequest) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "assert" in code[-1].source
    assert all(len(cell.source.splitlines()) <= 18 for cell in code)
    stored = [output_of(cell) for cell in code]
    assert any(stored), "a notebook is stored with its outputs"
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    if request.config.getoption("--regold"):
        nbformat.write(notebook, path)
        return
    # Plans, orders and errors print alike everywhere; bytes of memory depend on the version of XLA.
    printed = [output_of(cell) for cell in code]
    assert [text for text in printed if "temporaries" not in text] == [
        text for text in stored if "temporaries" not in text
    ]


def output_of(cell: nbformat.NotebookNode) -> str:
    text = "".join(output.get("text", "") for output in cell.outputs if output.get("name") != "stderr")
    return re.sub(r"((?:lowering|collectives)\.py):\d+", r"\1:N", text)  # a line of ours, which may move
