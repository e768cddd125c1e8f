"""The tables of contents, which the pages themselves do not show, and `index.html`."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# Caption and pages. A page that is in none of them is under the last caption.
CONTENTS = {
    "Start": ["docs/install", "docs/quickstart", "docs/migration", "docs/comparison", "docs/faq"],
    "Language": ["docs/transforms", "docs/steps", "docs/numerics", "docs/sharding", "docs/laws", "docs/autotune"],
    "Programs": ["docs/inspecting", "docs/performance", "benchmarks/README", "tests/optimizers/RESULTS"],
    "Training": [
        "docs/runner",
        "docs/recipes",
        "docs/faults",
        "tests/faults/RESULTS",
        "docs/multihost",
        "examples/gpt/README",
    ],
    "Notebooks": ["notebooks/*"],
    "Reference": ["docs/reference/index", "docs/design", "CHANGELOG", ".github/CONTRIBUTING"],
    "Further": [],
}


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname != app.config.root_doc:
        return
    patterns = [page for pages in CONTENTS.values() for page in pages] + [docname, "docs/reference/*"]
    others = [page for page in sorted(app.env.found_docs) if not any(fnmatch(page, one) for one in patterns)]
    *_, last = CONTENTS
    for caption, pages in (CONTENTS | {last: others}).items():
        if pages:
            options = [":hidden:", ":glob:", f":caption: {caption}"]
            source[0] += "\n".join(["\n```{toctree}", *options, "", *(f"/{page}" for page in pages), "```\n"])


def add_index(app: Sphinx, exception: Exception | None) -> None:
    """The home page by the name that a server and a reader of files look for."""
    if exception is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{app.config.root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True}
