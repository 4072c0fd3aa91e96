"""Writes bytes for people."""

from collections.abc import Mapping


def size(count: int) -> str:
    """Writes bytes in the largest binary unit of which there is one: `3.4 GiB`."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:,.0f} {units[0]}" if units[0] == "B" else f"{amount:,.1f} {units[0]}"


def listed(sizes: Mapping[str, int]) -> str:
    """Writes the sizes that are not zero, each behind its name: `masters 3.4 GiB, moments 6.8 GiB`,
    in which `_` is a space."""
    return ", ".join(f"{kind.replace('_', ' ')} {size(n)}" for kind, n in sizes.items() if n)
