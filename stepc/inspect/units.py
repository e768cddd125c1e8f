"""How sizes print; it must not know what is measured."""


def readable(bytes_: int) -> str:
    """Print a number of bytes with a decimal unit: 128 B, 1.5 kB, 126.8 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(bytes_) >= size:
            return f"{bytes_ / size:.1f} {unit}"
    return f"{bytes_} B"
