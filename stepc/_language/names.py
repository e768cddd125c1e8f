"""The names that model libraries give the dimensions of parameters, read from their boxes. It imports none of them."""

from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import NamedSharding

from stepc._core.sharding import Entry, Spec
from stepc._language.state import ARRAY_LIKE, leaves_by_path, path_of

# Where NNX keeps the names, newest first.
_METADATA = ("out_sharding", "sharding_names", "sharding")


@runtime_checkable
class Box(Protocol):
    """A parameter in a box that names its dimensions, as Linen makes it: `Partitioned`, `LogicallyPartitioned`."""

    names: Any  # Any: for each dimension a name, several, or None

    def replace_boxed(self, val: Any) -> Any: ...  # Any: a box around another value


@runtime_checkable
class Variable(Protocol):
    """A parameter with metadata, as NNX makes it: `nnx.Param`."""

    def get_metadata(self) -> Any: ...  # Any: a dict

    def set_metadata(self, metadata: Any) -> None: ...  # Any: a dict


def names_by_path(tree: Any) -> dict[str, Spec]:  # Any: a tree of the user's
    """The names of the dimensions of each leaf that has some. Its path is that without the box."""
    found: dict[str, Spec] = {}
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box)
    for path, node in [(path_of(keys), node) for keys, node in nodes if _is_box(node)]:
        match node:
            case Box():
                found[path] = _as_spec(node.names)
            case Variable():
                metadata = node.get_metadata()
                names = next((metadata[key] for key in _METADATA if metadata.get(key) is not None), None)
                inner = [one for one, _ in leaves_by_path(node)]
                if names is not None and len(inner) == 1:
                    found["/".join(filter(None, (path, *inner)))] = _as_spec(names)
            case _:
                pass
    return {path: names for path, names in found.items() if any(names)}


def unboxed(tree: Any) -> Any:  # Any, twice: trees of the user's
    """The tree with the value of each Linen box in its place.

    A box constrains its value to the axes that it names when the model reads it: those are not axes of this mesh, or
    they are manual there. A variable of NNX constrains nothing, and its module needs it.
    """

    def is_of_linen(node: object) -> bool:
        return _is_box(node) and isinstance(node, Box)

    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if is_of_linen(node) else node, tree, is_leaf=is_of_linen)


def _is_box(node: object) -> bool:
    # Arrays come first: Python takes as long to compare a value with a protocol as jax to trace an operation.
    return not isinstance(node, (*ARRAY_LIKE, jax.ShapeDtypeStruct)) and isinstance(node, Box | Variable)


def _as_spec(names: Any) -> Spec:  # Any: as in `Box`, or a sharding
    entries = names.spec if isinstance(names, NamedSharding) else names

    def entry(one: Any) -> Entry:  # Any: a name, several, or None
        return tuple(map(str, one)) if isinstance(one, tuple | list) else None if one is None else str(one)

    return tuple(map(entry, entries))
