"""The README's table of what is equal to what, made of the tests' own parameter lists.

python tests/shown.py          # prints it; with --write it goes into the README
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = "1e-9"  # of `equal.assert_equal`, relative to each tensor's largest element, in fp64
TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- made by tests/shown.py -->\n", "<!-- end of the table -->\n"


@dataclass(frozen=True)
class Row:
    """What a test shows.

    Attributes:
        symbols: of the pattern, or what else is compared.
        options: what is switched on, in words.
        oracle: what it is compared with.
        tolerance: of outputs and gradients.
    """

    symbols: str
    options: str
    oracle: str
    tolerance: str = TOLERANCE


def shown() -> list[Any]:
    """The `CASES` and `TABLE` of all tests of models and kernels."""
    rows: list[Any] = []
    for path in sorted(TESTS.glob("models/test_*.py")) + sorted(TESTS.glob("kernels/test_*.py")):
        module = importlib.import_module(path.stem)
        cases = getattr(module, "CASES", [])
        rows += [*(cases if isinstance(cases, list) else []), *getattr(module, "TABLE", [])]
    return rows


def table() -> str:
    """In Markdown, a line per symbols and oracle."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in shown():
        key = row.symbols, row.oracle, getattr(row, "tolerance", TOLERANCE)
        options = lines.setdefault(key, [])
        if row.options not in options:
            options.append(row.options)
    text = "| pattern | with | equal to | to |\n|---|---|---|---|\n"
    for (symbols, oracle, tolerance), options in lines.items():
        quoted = f"`{symbols}`" if not any(c.islower() for c in symbols[1:]) else symbols
        text += f"| {quoted} | {'; '.join(options)} | {oracle} | {tolerance} |\n"
    return text


def in_readme(text: str, made: str) -> str:
    """The README with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS / "models"), str(TESTS / "kernels")]
    made = table()
    if "--write" in sys.argv:
        README.write_text(in_readme(README.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made, end="")
