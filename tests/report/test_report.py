"""The page and the text: what they contain, that they load nothing, and how large they are."""

import base64
import re
import sys
import zlib
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc import report
from stepc.inspect import Memory, MemoryPart
from stepc.inspect.hlo import parse
from stepc.inspect.roofline import Device
from stepc.inspect.timeline import CollectiveSegment, ComputeSegment, LoopSegment
from stepc.report import pictures

ADAM = sc.update(optax.adam(1e-3))
MIDDLE = sc.clip(1.0) @ sc.accumulate(4) @ sc.shard(sc.dp("data"))
ROUND = Device("round", "", 1.0, 1, 1.0, 1.0, "ours")
VOID = {"meta", "input", "br"}


def loss(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean((jnp.tanh(rows["x"] @ params["in"]) @ params["out"]) ** 2)


def compiled() -> sc.Compiled:
    step = sc.compile(ADAM @ MIDDLE @ sc.grad(loss), mesh=mesh_of(data=8))
    params = {"in": jnp.ones((64, 128)), "out": jnp.ones((128, 32))}
    return step.lower(step.init(params), {"x": jax.ShapeDtypeStruct((256, 64), jnp.float32)}).compile()


class _Balance(HTMLParser):
    """Checks that tags close in order, and collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> str:
    balance = _Balance()
    balance.feed(html)
    loaded = [target for target in balance.loaded if not target.startswith("#")]
    assert (balance.open, loaded) == ([], [])
    anchors = {target.removeprefix("#") for target in balance.loaded}
    assert anchors <= set(re.findall(r'id="([^"]+)"', html))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", html)
    return html


def test_report_is_one_page_that_loads_nothing_and_weighs_little(tmp_path: Path) -> None:
    path = compiled().report(tmp_path / "step.html")
    html = checked(path.read_text(encoding="utf-8"))
    assert len(html.encode()) < 1_000_000
    for title in ("The step", "One step, to scale", "Memory on one device", "Collectives", "Laws", "Plan", "HLO"):
        assert f"<h2>{title}</h2>" in html
        assert f">{title}</a>" in html
    assert "<title>update @ clip @ accumulate @ shard @ grad</title>" in html
    assert "defer-reduce" in html and "microbatches/while × 4" in html


def test_like_collectives_are_one_row_and_each_is_below() -> None:
    layers = 12

    def deep(params: list[jax.Array], rows: jax.Array) -> jax.Array:
        for layer in params:
            rows = jnp.tanh(rows @ layer)
        return jnp.mean(rows**2)

    step = sc.compile(ADAM @ sc.shard(sc.dp("data", zero=3)) @ sc.grad(deep), mesh=mesh_of(data=8))
    shapes = [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * layers
    program = step.lower(step.init(shapes), jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile()
    kinds = Counter(row.kind for row in program.collectives())
    assert kinds["all-gather"] == layers
    html = checked(report.page(program.facts()))
    section = html.partition('<section id="collectives">')[2].partition("</section>")[0]
    grouped, _, each = section.partition("<details>")
    assert f'<td data-by="{layers}">{layers} ×</td><td data-by="all-gather">all-gather</td>' in grouped
    assert grouped.count("<tr>") < 1 + kinds.total()
    assert f"each of the {kinds.total()} collectives" in each
    assert each.count("<tr>") == 1 + kinds.total()


@pytest.mark.parametrize(
    ("title", "short"),
    [
        ("train_step", "train_step"),
        ("update(optax.chain(optax.clip(1.0), optax.adam(1e-3))) @ grad(loss)", "update @ grad"),
        (
            "a_very_long_name_of_a_function_that_nobody_should_write",
            "a_very_long_name_of_a_function_that_nobody_should…",
        ),
    ],
)
def test_title_of_the_window_is_short(title: str, short: str) -> None:
    facts = replace(compiled().facts(), title=title)
    assert f"<title>{short}</title>" in report.page(facts)


def test_report_contains_the_whole_program() -> None:
    program = compiled()
    html = report.page(program.facts())
    packed = re.search(r'id="packed">([^<]*)<', html)
    assert packed is not None
    assert zlib.decompress(base64.b64decode(packed[1])).decode() == program.hlo()


def test_report_of_a_program_that_is_too_long_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["stepc.report.page"], "_MAX_HLO_BYTES", 2_000)
    html = report.page(compiled().facts())
    assert re.search(r"The first [\d,]+ of [\d,]+ characters", html)


def test_report_groups_like_leaves_and_reads_its_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean((rows["x"] + sum(layer["b"] for layer in params["layers"])[None]) ** 2)

    monkeypatch.setattr(sys.modules["stepc.report.page"], "_MOST", 8)
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.grad(loss))
    state = step.init({"layers": [{"b": jnp.zeros(4)} for _ in range(30)]})
    program = step.lower(state, {"x": jnp.ones((8, 4))}).compile()
    parse.cache_clear()
    html = checked(report.page(program.facts()))
    assert parse.cache_info().misses == 1
    assert "params/layers/*/b (30 leaves)" in html and "params/layers/3/b" not in html


def test_report_of_a_function_compiled_without_stepc() -> None:
    program = jax.jit(lambda w, x: w - x.T @ jnp.tanh(x @ w), donate_argnums=0)
    shapes = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((64, 16), jnp.float32)
    facts = report.facts(program.lower(*shapes).compile(), title="<mine> & yours", device="gpu:h100")
    html = checked(report.page(facts))
    assert "<h1><code>&lt;mine&gt; &amp; yours</code></h1>" in html
    assert "No collectives: nothing is sent between devices." in html and "<h2>Plan</h2>" not in html
    assert "gpu:h100" in html
    assert "program <mine> & yours" in report.text(facts)


def test_report_of_a_loop_of_unknown_length_says_so() -> None:
    program = jax.jit(lambda w: jax.lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w @ w, w))
    facts = report.facts(program.lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile(), title="until")
    html = checked(report.page(facts))
    assert "no known trip count" in html
    assert "unknown" in report.text(facts)


def test_report_for_an_unknown_device_is_refused() -> None:
    with pytest.raises(sc.ConfigError, match="Unknown device"):
        compiled().report("never.html", device="tpu:v0")
    assert not Path("never.html").exists()


def test_explain_prints_the_plan_and_what_became_of_it() -> None:
    program = compiled()
    explained = program.explain()
    assert explained.startswith(str(program.plan))
    for title in ("collectives", "memory on one device", "work on one device", "donation"):
        assert f"as compiled: {title}\n" in explained
    assert "all 9 donated leaves are aliased" in explained
    assert "tpu:v5e: " in explained and "estimated from device peaks" in explained


def test_notebook_shows_the_pictures_without_a_script() -> None:
    html = checked(compiled()._repr_html_())
    assert html.startswith('<div class="stepc">')
    assert "<script" not in html and "<svg" in html


def test_transforms_are_drawn_in_the_order_in_which_they_act() -> None:
    html = pictures.transforms('update(optax.chain(a, "x @ y")) @ accumulate(4) @ grad(loss)', " @ ")
    shown = re.findall(r'class="transform (\w+)">([^<]*)<', html)
    assert [transform for _, transform in shown] == [
        "grad(loss)",
        "accumulate(4)",
        "update(optax.chain(a, &quot;x @ y&quot;))",
    ]
    assert [role for role, _ in shown] == ["source", "scan", "end"]


@pytest.mark.parametrize(
    ("node", "role"),
    [("mean[scan 4]", "scan"), ("mean[mesh data 8]", "mesh"), ("mean[vmap, float32]", "vmap"), ("scale(2)", "plain")],
)
def test_core_nodes_have_the_colour_of_where_their_mean_is(node: str, role: str) -> None:
    assert f'class="transform {role}"' in pictures.transforms(f"update . {node} . grad", " . ")


def bars(html: str) -> list[tuple[str, str, str]]:
    return re.findall(r'<rect class="(\w+)" x="([\d.]+%)" width="([\d.]+%)"', html)


def test_timeline_is_drawn_to_scale() -> None:
    loop = LoopSegment(
        2, (ComputeSegment(1, 0, "product"), CollectiveSegment("all-reduce", 1.0, 1, ("data",), False, "line")), "while"
    )
    html = pictures.timeline((loop, ComputeSegment(4, 0, "update")), ROUND)
    assert bars(html) == [
        ("compute", "0.0000%", "12.5000%"),
        ("collective", "12.5000%", "12.5000%"),
        ("compute", "25.0000%", "12.5000%"),
        ("collective", "37.5000%", "12.5000%"),
        ("compute", "50.0000%", "50.0000%"),
    ]
    assert "while × 2" in html and "iteration 2 of 2" in html


def test_timeline_lets_work_begin_beside_a_collective() -> None:
    html = pictures.timeline((CollectiveSegment("all-gather", 3.0, 1, (), True, ""), ComputeSegment(4, 0, "")), ROUND)
    assert bars(html) == [("collective", "0.0000%", "75.0000%"), ("compute", "0.0000%", "100.0000%")]


def test_timeline_of_many_iterations_is_drawn_as_one_bar() -> None:
    html = pictures.timeline((LoopSegment(1000, (ComputeSegment(1, 0, ""),), "while"),), ROUND)
    assert len(bars(html)) == 1 and "1000 iterations" in html


def test_memory_is_drawn_by_its_parts() -> None:
    parts = (MemoryPart("arguments", "parameters", 600), MemoryPart("temporaries", "activations and the rest", 400))
    html = pictures.memory(Memory(600, 600, 600, 400, 0, parts))
    assert re.findall(r"flex-grow:(\d+)", html) == ["600", "400"]
    assert "60%" in html and "40%" in html
