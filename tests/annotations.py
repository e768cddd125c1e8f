"""Annotations of the package are checked at run time: of functions of a module, and of methods of its classes.

Not of functions inside of functions: jaxtyping's hook decorates those again whenever the outer one is called, and that
took a fifth of the tests' time.
"""

import sys
from collections.abc import Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType

from beartype import beartype


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType | type) and value.__module__ == module.__name__ and not _is_tuple(value):
                setattr(module, name, beartype(value))


def _is_tuple(value: FunctionType | type) -> bool:
    """Whether it is a NamedTuple: the annotations of its `__new__` name types that are not there yet."""
    return isinstance(value, type) and issubclass(value, tuple)


class _Finder(MetaPathFinder):
    def __init__(self, modules: Collection[str]) -> None:
        self.modules = frozenset(modules)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.modules else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def check_annotations(modules: Collection[str]) -> None:
    """Check the annotations of these modules wherever they are called, once they are imported."""
    sys.meta_path.insert(0, _Finder(modules))
