"""What `stepc.inspect` and `stepc.report` export: sorted, complete, documented."""

import inspect
from types import ModuleType

import pytest

import stepc as sc


@pytest.mark.parametrize("package", [sc.inspect, sc.report], ids=lambda package: package.__name__)
def test_all_is_sorted_complete_and_documented(package: ModuleType) -> None:
    assert package.__all__ == sorted(package.__all__)
    values = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    public = {name for name, value in values.items() if not isinstance(value, ModuleType)}
    assert set(package.__all__) == public
    # A constant has no docstring of its own: that of the package names it.
    undocumented = [name for name in public if not inspect.getdoc(values[name]) and name not in str(package.__doc__)]
    assert undocumented == []
