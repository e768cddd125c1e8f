"""Sizes as a user writes them: 1024, "12MiB", "1.5 GB"."""

import re

from stepc.errors import FieldTypeError, FieldValueError

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)\s*")


def bytes_of(name: str, size: object) -> int:
    """Read a size: a number of bytes, or a string such as "12MiB", "1.5 GB" or "800 kB".

    Args:
      name: the argument that the size was given for; the message names it.
    Units: kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024.
    Errors: FieldTypeError or FieldValueError, with the accepted forms.
    """
    expected = 'a number of bytes, or a string such as "12MiB" or "1.5 GB"'
    facts = (("field", name), ("expected", expected), ("got", repr(size)))
    match size:
        case bool():
            raise FieldTypeError(f"{name}={size!r} is not a size.", facts=facts)
        case int() if size >= 0:
            return size
        case str() if (read := _SIZE.fullmatch(size)) and read[2] in _UNITS:
            return round(float(read[1]) * _UNITS[read[2]])
        case int() | str():
            raise FieldValueError(f"{name}={size!r} is not a size.", facts=facts)
        case _:
            raise FieldTypeError(f"{name}={size!r} is not a size.", facts=facts)
