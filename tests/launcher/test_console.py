"""Command output: a reader that closes its pipe, and a JSON report as the only text on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from colonnade.launcher.cli.report import reporting

PRINTS = """
import subprocess, sys
from colonnade.launcher.console import tolerate_closed_streams
with tolerate_closed_streams():
    print("first", flush=True)
    sys.stdin.readline()
    for _ in range(100_000):
        print("more")
    print("still", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
"""


def test_a_command_goes_on_after_its_reader_closes_the_pipe(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, str(tmp_path / "end")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stderr.read() == "still\n"
    assert process.wait(30) == 0
    assert (tmp_path / "end").read_text() == "done"


def test_a_report_is_the_only_text_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """Other text that the process and its children print during the block goes to stderr."""
    with reporting("-") as report:
        print("of the run")
        subprocess.run([sys.executable, "-c", "print('of a rank')"], check=True)
        report({"step": 3})
    print("afterwards")
    out, err = capfd.readouterr()
    assert json.loads(out.removesuffix("afterwards\n")) == {"step": 3}
    assert {"of the run", "of a rank"} <= set(err.splitlines())
