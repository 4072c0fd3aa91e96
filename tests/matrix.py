"""The README's parity matrix, made of the stored report of `colonnade verify --all`.

colonnade verify --all --nproc 8 --json report.json
python tests/matrix.py --write report.json  # stores its verdicts, and renews the README
"""

import json
import sys
from pathlib import Path
from typing import Any

from colonnade.launcher.verify.matrix import matrix, summary

ROOT = Path(__file__).parent.parent
README, STORED = ROOT / "README.md", ROOT / "docs" / "matrix.json"
BEGIN, END = "<!-- made by tests/matrix.py -->\n", "<!-- end of the matrix -->\n"


def in_readme(text: str, made: str) -> str:
    """The README with the matrix in its place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]


def stored() -> dict[str, Any]:
    """The stored report."""
    return json.loads(STORED.read_text(encoding="utf-8"))


def write_stored(report: dict[str, Any]) -> None:
    """Stores what the table is made of, a line for each case."""
    text = json.dumps(summary(report), indent=1)
    STORED.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv:
        (path,) = sys.argv[2:]
        write_stored(json.loads(Path(path).read_text(encoding="utf-8")))
        made = in_readme(README.read_text(encoding="utf-8"), matrix(stored()))
        README.write_text(made, encoding="utf-8")
    else:
        print(matrix(stored()), end="")
