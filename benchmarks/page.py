"""Write README.md: the newest saved result of every script, its tables and its plot, and what is to be said of them.

`notes/head.md` and `notes/<script>.md` are written by hand; every number that a script printed comes from
`results/<date>-<script>.json`, which `--save` writes. Plots need matplotlib, of the extra `demo`.
"""

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

HERE = Path(__file__).parent
LONGEST = 12  # rows of a table that is not folded
RESULT = re.compile(r"(\d{4}-\d\d-\d\d)-(.+)\.json")


def newest() -> dict[str, dict[str, Any]]:
    """The last result of each benchmark that has tables, by its name."""
    found = {}
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text())
        if RESULT.fullmatch(path.name) and "tables" in result and not result["quick"]:
            found[result["benchmark"]] = result
    return found


def setting_text(setting: dict[str, Any]) -> str:
    """When and where it was measured."""
    versions = ", ".join(f"{name} {setting[name]}" for name in ("jax", "jaxlib", "optax", "numpy"))
    load = f"load {setting['load'][0]:.1f} at the start"
    machine = f"{setting['machine']} ({load}), Python {setting['python']}, {versions}, {setting['platform'].upper()}"
    return f"{setting['date']}; commit {setting['commit']}; {machine}."


def table_text(title: str, rows: list[list[str]]) -> str:
    """A table in Markdown."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    head, *body = rows
    table = "\n".join((line(head), "|" + "---|" * len(head), *map(line, body)))
    if len(body) <= LONGEST:
        return f"**{title}**\n\n{table}"
    return f"<details><summary>{title}; {len(body)} rows</summary>\n\n{table}\n\n</details>"


def plot(name: str, ratios: list[list[Any]]) -> str:
    """Write the picture of the ratios: medians, quartiles, and the target of each. Its place, from this folder."""
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(ratios)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (_, spread, target) in enumerate(ratios):
        width = ([spread["median"] - spread["low"]], [spread["high"] - spread["median"]])
        axes.errorbar(spread["median"], place, xerr=width, fmt="o", color="C0", capsize=3, markersize=5)
        if target is not None:
            axes.plot(target, place, "|", color="C3", markersize=14, markeredgewidth=2)
    axes.axvline(1.0, color="0.6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(ratios)), [label for label, _, _ in ratios], fontsize=8)
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    if max(spread["high"] for _, spread, _ in ratios) > 3:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    has_target = any(target is not None for _, _, target in ratios)
    figure.supxlabel("ratios of times: median and quartiles" + "; red: target" * has_target, fontsize=9)
    path = HERE / "plots" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"plots/{name}.png"


def section(name: str, result: dict[str, Any]) -> str:
    """One benchmark."""
    setting = result["setting"]
    question = setting["question"]
    sentence = f"{question[:1].upper()}{question[1:]}{'' if question.endswith('?') else '.'}"
    parts = [f"## `{name}`", sentence, setting_text(setting)]
    if result["ratios"]:
        parts.append(f"![Ratios of {name}]({plot(name, result['ratios'])})")
    parts += [table_text(title, rows) for title, rows in result["tables"]]
    return "\n\n".join((*parts, *notes(name)))


def notes(name: str) -> list[str]:
    """What is to be said of a benchmark, if anything is."""
    path = HERE / "notes" / f"{name}.md"
    return [path.read_text().strip()] if path.exists() else []


def main() -> None:
    results = newest()
    alone = [path.stem for path in sorted((HERE / "notes").glob("*.md")) if path.stem not in {"head", *results}]
    parts = [*notes("head"), *(section(name, results[name]) for name in sorted(results))]
    for name in alone:
        parts += [f"## `{name}`", *notes(name)]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n")
    print(f"benchmarks/README.md: {', '.join(sorted(results))}")


if __name__ == "__main__":
    main()
