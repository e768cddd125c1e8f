"""How sizes print, and how they are read; it must not know what is measured."""

import re

from stepc.errors import FieldTypeError, FieldValueError

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)\s*")


def readable(bytes_: int) -> str:
    """Print a number of bytes with a decimal unit: 128 B, 1.5 kB, 126.8 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(bytes_) >= size:
            return f"{bytes_ / size:.1f} {unit}"
    return f"{bytes_} B"


def bytes_of(name: str, size: object) -> int:
    """Read a size: a number of bytes, or a text such as "12MiB", "1.5 GB" or "800 kB".

    Args:
      name: what the size is of, for the message.
    Units: kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024.
    Errors: FieldTypeError or FieldValueError, with the forms that are known.
    """
    expected = 'a number of bytes, or a text such as "12MiB" or "1.5 GB"'
    facts = (("field", name), ("expected", expected), ("got", repr(size)))
    match size:
        case bool():
            pass
        case int() if size >= 0:
            return size
        case str() if (read := _SIZE.fullmatch(size)) and read[2] in _UNITS:
            return round(float(read[1]) * _UNITS[read[2]])
        case int() | str():
            raise FieldValueError(f"{name}={size!r} is not a size.", facts=facts)
        case _:
            pass
    raise FieldTypeError(f"{name}={size!r} is not a size.", facts=facts)
