"""The site builds without a warning, and no link in it is dead."""

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import stepc as sc

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sphinx_book_theme") is None, reason="the extra is not installed: pip install '.[docs]'"
)


class Page(HTMLParser):
    """What a page refers to, and the places in it that can be referred to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "href" and value and tag == "a":
                self.links.append(value)
            if name in ("href", "src") and value and tag != "a":
                self.loaded.append(value)
            if name == "id" and value:
                self.places.add(value)


def test_site_builds_without_a_warning_and_has_no_dead_link(tmp_path: Path) -> None:
    """One test, because the site takes a while to build, and processes side by side would each build it."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-c",
        "docs",
        "-d",
        str(tmp_path / "doctrees"),
    ]
    site = tmp_path / "html"
    done = subprocess.run([*command, ".", str(site)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path) for path in site.rglob("*.html") if site / "_static" not in path.parents}
    dead = dead_links(site, pages)
    assert not dead, "\n".join(dead)
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()

    reference = site / "docs" / "reference"
    places = set().union(*(page.places for path, page in pages.items() if path.parent == reference))
    missing = [name for name in sc.__all__ if not {f"stepc.{name}", f"module-stepc.{name}"} & places]
    assert missing == ["errors"], "the classes of that module are names of stepc"

    # Names in code are links, to our reference and to those of other libraries.
    assert "errors.html#stepc.PipelineTypeError" in pages[reference / "clip.html"].links
    jax = "https://docs.jax.dev/en/latest/jax.sharding.html#jax.sharding.PartitionSpec"
    assert jax in pages[reference / "tp.html"].links


def dead_links(site: Path, pages: dict[Path, Page]) -> list[str]:
    """Of each page, the links into the site that lead nowhere, and what it would load from the net."""
    dead = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    dead.append(f"{path.relative_to(site)} loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.is_file() or (target in pages and place and place not in pages[target].places):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<h1 id="here"></h1><a href="#here"></a><a href="#there"></a><a href="other.html"></a>'
        '<a href="https://example.org"></a><script src="https://example.org/a.js"></script><link href="page.html#here">'
    )
    assert dead_links(tmp_path, {page: Page(page)}) == [
        "page.html: #there",
        "page.html: other.html",
        "page.html loads https://example.org/a.js",
    ]
