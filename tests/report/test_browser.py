"""The page in a browser: it opens at once, runs without an error, and fits wide and narrow windows, light and dark."""

import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from waiting import LIMIT_SECONDS

import stepc as sc
from examples.gpt import model as gpt
from examples.gpt.job import Job
from examples.gpt.train import pipeline_of

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed: apt install chromium")

# Inserted into a copy of the page: the page itself reports nothing to anyone.
PROBE = """<script>
addEventListener("error", event => document.documentElement.setAttribute("data-error", event.message));
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  root.setAttribute("data-wider", root.scrollWidth - root.clientWidth);
  root.setAttribute("data-paper", getComputedStyle(document.body).backgroundColor);
  root.setAttribute("data-parts", document.querySelectorAll("details").length);
  root.setAttribute("data-tall", root.scrollHeight);
  const tables = [...document.querySelectorAll(".scroll")].filter(one => one.offsetParent);
  root.setAttribute("data-table", Math.max(...tables.map(one => one.offsetHeight)));
}, 300));
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the demo's step, for eight devices."""
    job = Job()
    step = sc.compile(pipeline_of(job), mesh=mesh_of(data=8))
    state = step.init(jax.eval_shape(lambda: gpt.init(jax.random.key(0), job.size)))
    batch = {"tokens": jax.ShapeDtypeStruct((64, job.context + 1), jnp.uint8)}
    return step.lower(state, batch).compile().report(tmp_path_factory.mktemp("report") / "step.html")


def opened(page: Path, *, width: int, dark: bool) -> dict[str, str]:
    """What the browser says of the page, by name."""
    copy = page.with_name("probed.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},900",
            "--virtual-time-budget=3000", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True,
    )  # fmt: skip
    return dict(re.findall(r'data-(\w+)="([^"]*)"', done.stdout.partition(">")[2].partition(">")[0]))


def test_page_of_the_demo_is_smaller_than_a_megabyte(page: Path) -> None:
    """How soon it opens is not asserted: that is the machine's."""
    assert page.stat().st_size < 1_000_000


@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_the_window_follows_the_scheme_and_unfolds_its_program(page: Path, width: int, dark: bool) -> None:
    probed = opened(page, width=width, dark=dark)
    assert "error" not in probed
    assert probed["wider"] == "0", "only tables and text scroll sideways"
    assert probed["paper"] == ("rgb(22, 24, 28)" if dark else "rgb(251, 250, 248)")
    assert int(probed["parts"]) > 100, "the HLO is unpacked by the page's own script"
    assert int(probed["tall"]) < 6000, "however many leaves, collectives and computations there are"
    assert int(probed["table"]) <= 522, "the bar that scrolls a table sideways is in reach"
