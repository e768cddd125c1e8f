"""Names in code become links: `sc.Mean`, `clip`, `jax.jit`. Pages write them as plain code."""

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import stepc as sc

NAME = re.compile(r"(?:(?P<ours>sc|stepc)\.)?(?P<name>[\w.]+)(?:\(\))?")
ALIASES = {"jnp": "jax.numpy", "np": "numpy", "lax": "jax.lax"}
LIBRARIES = ("jax", "optax", "numpy")


class Links(SphinxPostTransform):
    """Before references are resolved; a name that no inventory has stays what it was."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            target = target_of(literal.astext())
            if target is None or not isinstance(literal.parent, nodes.TextElement):
                continue
            if any(isinstance(parent, nodes.reference | nodes.title | nodes.term) for parent in ancestors(literal)):
                continue
            if self.env.docname == f"docs/reference/{target.removeprefix('stepc.')}":
                continue  # a page does not link to itself
            link = addnodes.pending_xref(
                "", literal.deepcopy(), refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname
            )
            literal.replace_self(link)


def ancestors(node: nodes.Node) -> list[nodes.Node]:
    return [] if node.parent is None else [node.parent, *ancestors(node.parent)]


def target_of(code: str) -> str | None:
    """The full name of what a piece of code names, if it is one name that could be documented."""
    if code in {"KeyboardInterrupt", "SystemExit"}:
        return code
    match = NAME.fullmatch(code)
    if match is None:
        return None
    root, _, rest = match["name"].partition(".")
    if root in sc.__all__ and (match["ours"] or root in LINKED_ALONE):
        return f"stepc.{match['name']}"
    root = ALIASES.get(root, root)
    return f"{root}.{rest}" if rest and root.partition(".")[0] in LIBRARIES else None


def _linked_alone(name: str) -> bool:
    """A transform, a rule or a class; `run` or `rows` may mean something else without `sc.`."""
    return name not in {"rows", "reference", "run", "compile", "restore"} and callable(getattr(sc, name))


LINKED_ALONE = {name for name in sc.__all__ if _linked_alone(name)}


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_post_transform(Links)
    return {"parallel_read_safe": True}
