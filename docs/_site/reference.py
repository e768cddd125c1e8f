"""The reference: written into `docs/reference/` from `stepc.__all__` when a build begins, and not kept by git.

A transform and a rule of `shard` have a page each, with the plan of the first example of its docstring. Everything else
is on the page of what it is about.
"""

import doctest
import inspect
import linecache
import textwrap
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from docstrings import escaped
from sphinx.application import Sphinx

import stepc as sc

# The package of a name: the page that it is on, and the title of that page. The first that fits counts.
PAGES = {
    "stepc._language.transforms": ("transforms", "Transforms"),
    "stepc._language.sharding": ("rules", "Rules of shard"),
    "stepc._language.terms": ("terms", "Losses and metrics"),
    "stepc._language.state": ("steps", "Steps and programs"),
    "stepc._language.padding": ("steps", "Steps and programs"),
    "stepc._compiler": ("steps", "Steps and programs"),
    "stepc._language": ("extending", "Transforms of your own"),
    "stepc._runner": ("running", "Runs"),
    "stepc._distributed": ("running", "Runs"),
    "stepc.inspect": ("steps", "Steps and programs"),
    "stepc.errors": ("errors", "Errors"),
}
PAGE_EACH = ("transforms", "rules")

SETUP = """
    def loss(params, rows, keys=None):
        return jnp.mean((jnp.tanh(rows["x"] @ params["d"]["qkv"]) @ params["g"]["out"] - rows["y"]) ** 2)


    def encode(params, rows):
        return jnp.tanh(rows["x"] @ params["d"]["qkv"])


    def head(params, z):  # every row is compared with every other
        return jnp.mean((z @ z.T) ** 2) + jnp.mean((z @ params["g"]["out"]) ** 2)


    def norms(grads, params):
        return {"norms": jnp.stack([jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(grads)])}


    params = {"d": {"qkv": np.ones((16, 32), np.float32)}, "g": {"out": np.ones((32, 1), np.float32)}}
    batch = {"x": np.ones((256, 16), np.float32), "y": np.ones((256, 1), np.float32)}
"""


def write_reference(app: Sphinx) -> None:
    folder = Path(app.srcdir, "docs", "reference")
    pages = pages_of_the_reference()
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:  # Sphinx reads again what is newer
            path.write_text(text)


def pages_of_the_reference() -> dict[str, str]:
    names, titles, modules = defaultdict(list), {}, []
    for name in sc.__all__:
        value = getattr(sc, name)
        if isinstance(value, ModuleType):
            modules.append(name)
            continue
        found = [page for package, page in PAGES.items() if value.__module__.startswith(package)]
        if not found:
            raise LookupError(f"`{name}` of {value.__module__} is on no page of the reference: add one to `PAGES`.")
        page, title = found[0]
        titles[page] = title
        names[page].append(name)
    modules.remove("errors")  # its classes are names of stepc
    order = [page for page in dict.fromkeys(page for page, _ in PAGES.values()) if page in titles]
    pages = {}
    for page in order:
        if page in PAGE_EACH:
            pages |= {name: transform_page(name, getattr(sc, name)) for name in names[page]}
        else:
            entries = "\n".join(entry(f"stepc.{name}", getattr(sc, name)) for name in names[page])
            pages[page] = f"{heading(titles[page])}\n{entries}"
    pages |= {name: module_page(getattr(sc, name)) for name in modules}
    listed = [(titles[page], names[page]) for page in order]
    pages["index"] = index_page([*listed, ("Modules", modules)], list(pages))
    return pages


def index_page(listed: list[tuple[str, list[str]]], pages: list[str]) -> str:
    """Every name with the first line of its docstring."""
    tables = []
    for title, names in listed:
        rows = [f"   * - :py:obj:`{name} <stepc.{name}>`\n     - {summary(getattr(sc, name))}" for name in names]
        tables += [heading(title, "-"), ".. list-table::\n   :widths: 20 80\n", *rows, ""]
    contents = "\n".join([".. toctree::\n   :hidden:\n", *(f"   {page}" for page in pages)])
    return f"{heading('Reference')}\nEvery public name, from its docstring.\n\n{contents}\n\n" + "\n".join(tables)


def summary(value: Any) -> str:
    first, _, _ = (inspect.getdoc(value) or "").partition("\n\n")
    return escaped(" ".join(first.split()))


def transform_page(name: str, function: Any) -> str:
    lines = [heading(name), entry(f"stepc.{name}", function)]
    if function is sc.logical:  # its names are those that a model library gives to parameters, and ours have none
        return "\n".join(lines)
    example, plan = example_and_plan(function)
    plan_of = ["Of this pipeline, on eight devices:\n", block("python", example), block("text", plan)]
    return "\n".join([*lines, heading("A plan", "-"), *plan_of, "The names in it stand for:\n", block("python", SETUP)])


def module_page(module: ModuleType) -> str:
    """The names of a module, but for those that have a place among the names of stepc."""
    names = [name for name in module.__all__ if callable(getattr(module, name)) and name not in sc.__all__]
    entries = "\n".join(entry(f"{module.__name__}.{name}", getattr(module, name)) for name in names)
    return f"{heading(module.__name__)}\n.. automodule:: {module.__name__}\n\n{entries}"


def entry(name: str, value: Any) -> str:
    match value:
        case type() if issubclass(value, BaseException):
            return f".. autoexception:: {name}\n   :members:\n   :show-inheritance:\n"
        case type():
            return f".. autoclass:: {name}\n   :members:\n"
        case _:
            return f".. autofunction:: {name}\n"


def example_and_plan(function: Any) -> tuple[str, str]:
    """The first example of the docstring, made a step, and its plan. Nothing is compiled."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(function) or "")
    number = next(number for number, example in enumerate(examples) if example.want)
    statements, expression = [one.source for one in examples[:number]], examples[number].source.strip()
    if function in (sc.dp, sc.tp):
        rules = expression if function is sc.dp else f'dp("data"), {expression}'
        expression = f"shard({rules}) @ grad(loss)"
    gives = run("".join(statements) + f"pipeline = {expression}\n")["pipeline"].gives
    prefix = "update(optax.adamw(3e-4)) @ " if gives is sc.Kind.GRADIENT else ""
    source = "".join(statements) + f"pipeline = {prefix}{expression}\n"
    names = run(source)
    axes = {"data": 2, "model": 4} if function is sc.tp else {"data": 8}
    step = sc.compile(names["pipeline"], mesh=jax.make_mesh(tuple(axes.values()), tuple(axes)))
    leading = (32,) if function is sc.repeat else ()
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leading + leaf.shape, leaf.dtype), names["batch"])
    return source, str(step.lower(step.init(names["params"]), batch).plan)


def run(source: str) -> dict[str, Any]:
    """The names after the code, which a pipeline quotes as the user's."""
    names = {name: getattr(sc, name) for name in sc.__all__} | {"__name__": "__main__", "jax": jax, "jnp": jnp}
    names |= {"np": np, "optax": optax, "P": jax.sharding.PartitionSpec}
    lines = (textwrap.dedent(SETUP) + source).splitlines(keepends=True)
    linecache.cache["train.py"] = (0, None, lines, "train.py")
    exec(compile("".join(lines), "train.py", "exec"), names)
    return names


def heading(title: str, line: str = "=") -> str:
    return f"{title}\n{line * len(title)}\n"


def block(language: str, text: str) -> str:
    return f".. code-block:: {language}\n\n{textwrap.indent(textwrap.dedent(text).strip(), '   ')}\n"


def without_signature(app: Sphinx, what: str, *_: object) -> tuple[str, str] | None:
    """Nobody but stepc makes its errors, so how that is done is not told."""
    return ("", "") if what == "exception" else None


def setup(app: Sphinx) -> dict[str, Any]:
    jax.config.update("jax_num_cpu_devices", 8)
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-signature", without_signature)
    return {"parallel_read_safe": True}
