"""`verify --all`: one start of ranks for all recipes, its report, and the table made of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from colonnade.launcher.cli import main
from colonnade.launcher.verify import plan, run
from colonnade.launcher.verify.matrix import matrix, summary
from colonnade.launcher.verify.table import table_of_all

LAYOUTS = (
    "tp=2,pp=2,sequence=true,schedule=zbv,residual=ladder,recompute=none",
    "tp=2,pp=2,sequence=false,schedule=gpipe,residual=standard,recompute=block",
    "dp_shard=2,tp=2,sequence=true,residual=ladder,recompute=none",
)


def report_of(*unequal: int) -> dict[str, Any]:
    """A report of a dense model, in which the cases of these numbers are not equal."""
    layouts = [
        {"layout": name, "precision": "fp64", "equal": i not in unequal, "compared": {}}
        for i, name in enumerate(LAYOUTS)
    ]
    covering = {"cases": 9, "pairs": 100, "impossible": []}
    one = {"family": "dense", "recipe": "r", "layouts": layouts, "covering": covering}
    return {"ranks": 4, "device": "cpu", "recipes": [one]}


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the tables, by the first of a line."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def test_the_table_counts_cases() -> None:
    text = matrix(report_of())
    assert text.startswith(
        "3 of 3 cases on 4 ranks are equal to one process in fp64; they are a sample"
    )
    cells = rows(text)
    assert cells["axes"] == ["dense"]
    assert cells["`tp`, `pp`"] == ["1 + 1"]
    assert cells["`dp_shard`, `tp`"] == ["– + 1"]
    assert cells["`cp`, `ep`"] == ["–"]
    assert cells["`parallel.schedule = zbv`"] == ["–", "–", "–", "1", "1", "–"]
    assert cells["`recompute = none`"] == ["–", "1", "–", "2", "1", "–"]
    assert cells["`parallel.sequence = false`"] == ["–", "–", "–", "1", "1", "–"]


def test_the_table_shows_what_is_not_equal() -> None:
    text = matrix(report_of(0))
    assert text.startswith("2 of 3 cases on 4 ranks are equal")
    cells = rows(text)
    assert cells["`tp`, `pp`"] == ["1 + **1 of 1 not equal**"]
    assert cells["`recompute = none`"][3] == "**1 of 2 not equal**"


def test_the_summary_makes_the_same_table() -> None:
    report = report_of(1)
    short = summary(report)
    assert matrix(json.loads(json.dumps(short))) == matrix(report)
    assert "compared" not in short["recipes"][0]["layouts"][0]


def test_all_starts_ranks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here for two of the recipes, with a case each."""
    starts = []
    start_ranks = run.start_ranks

    def counted(*arguments: Any) -> int:
        starts.append(arguments)
        return start_ranks(*arguments)

    two = {"dense": "tiny-dense", "hybrid": "tiny-hybrid"}
    monkeypatch.setattr(run, "start_ranks", counted)
    monkeypatch.setattr(plan, "FAMILIES", two)
    monkeypatch.setattr(run, "FAMILIES", two)
    monkeypatch.chdir(tmp_path)
    words = ["verify", "--all", "--nproc", "2", "--sample", "1"]
    assert main([*words, "--json", "all.json", "--table", "all.md"]) == 0
    assert len(starts) == 1
    report = json.loads(Path("all.json").read_text())
    assert report["equal"]
    assert [(r["family"], r["recipe"], r["steps"]) for r in report["recipes"]] == [
        (family, recipe, 2) for family, recipe in two.items()
    ]
    assert [[r["precision"] for r in one["layouts"]] for one in report["recipes"]] == [["fp64"]] * 2
    assert report["processor_seconds"] > 0
    assert Path("all.md").read_text() == matrix(report)
    progress = [line for line in capfd.readouterr().err.splitlines() if " 1/1  " in line]
    assert [line.split()[0] for line in progress] == list(two.values())
    text = table_of_all(report)
    assert "\n1 of the " in text
    assert text.splitlines()[-1].startswith("equal: 2 cases of 2 recipes, ")
    monkeypatch.setattr(run, "verify_all", lambda **_: report | {"equal": False})
    assert main([*words, "--json", "again.json"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--all", "quickstart"], "recipes and layouts of its own"),
        (["--all", "--layout", "tp=2"], "recipes and layouts of its own"),
        (["quickstart", "--table", "t.md"], "verify --all"),
        ([], "name a recipe"),
        (["quickstart", "--layout", "tp=2", "--sample", "3"], "--sample draws"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words, "--nproc", "2"]) == 2
    assert message in capsys.readouterr().err
