"""Plans with optimizer state in the host's memory: what they report, and what fits."""

import json
import subprocess
import sys
from typing import Any

import pytest
from test_plan_fit import report as report_of_state

from colonnade.launcher.cli import main
from colonnade.launcher.cluster.devices import DEVICES, GIB, Device, parse_device
from colonnade.launcher.errors import UserError
from colonnade.launcher.plan.fit import (
    Change,
    Fit,
    Held,
    Lack,
    beginnings,
    changes_of_host,
    joined,
    require_fit,
)
from colonnade.launcher.plan.table import table
from colonnade.launcher.recipe.load import load_recipe
from colonnade.models.shapes import measure

# State outweighs activations, and nothing else can be changed: one rank, one row.
WIDE = [
    "model.pattern=*-", "model.repeat=6", "model.hidden=64", "model.heads=4", "train.seq_len=16",
    "train.micro_batch=1", "train.global_batch=1", "train.recompute=block", "train.precision=bf16",
]  # fmt: skip
HOST, INTERLEAVED = "optimizer.offload=host", "optimizer.offload=interleaved"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "colonnade.launcher", "plan", "quickstart", "--dry-run"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)


def report(*arguments: str) -> dict[str, Any]:
    result = plan(*arguments, "--json", "-")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_report_of_offloaded_state() -> None:
    """Eight ranks, of which each has an eighth, but for padding on the host."""
    fields = ["--gpus", "8", "train.micro_batch=2", "train.precision=bf16", INTERLEAVED]
    found = report(*fields)
    elements = found["elements"]
    assert 0 < 8 * elements - found["parameters"] < 8 * 200
    memory, host, state = found["memory"], found["host"], found["offloaded"]
    assert memory["gradients"] == 4 * elements
    assert memory["optimizer"] == 0
    assert 2 * elements < memory["parameters"] < 2.1 * elements
    assert host["saved_copies"] == 12 * elements
    assert host["moments"] == 2 * host["masters"] == 2 * host["gradients"] >= 8 * elements
    assert 2 * elements < host["weights"] < host["masters"] / 2
    assert 0 < state["kept_gradients"] < memory["gradients"]
    assert state["slots"] == 2
    assert memory["update"] >= 2 * state["slot"]
    text = table(found)
    assert f"{2 * state['slot']:,}" in text
    assert (
        f"the state of {state['device_groups']} of {state['groups']} groups in turn; more" in text
    )
    assert "in the first step; in later ones" in text
    assert all(f"{size:,}" in text for size in (*host.values(), sum(host.values())) if size)
    assert "optimizer state" not in text


def test_tables_say_when_gradients_leave() -> None:
    """With several micro-batches all are there until the last; where order is fixed two slots."""
    found = report("--gpus", "1", *WIDE, HOST, "checkpoint.asynchronous=false")
    assert "in the first step; in later ones none stay for the update" in table(found)
    assert "slots" not in table(found)
    assert found["host"]["saved_copies"] == 0
    found |= {"micro_batches": 2}
    text = "gradients, until the last micro-batch; none stay for the update, in the first step all"
    assert text in table(found)
    found["offloaded"] |= {"slots": 1, "slot": 9, "more_slots": False}
    assert "1 slots during updates" in table(found)
    assert "margin" not in table(found)


def test_a_device_that_offload_fits() -> None:
    """Between the peaks of both the plan is refused, and what it offers is accepted."""
    peaks = {field: report("--gpus", "1", *WIDE, field)["memory"]["peak"]
             for field in ("optimizer.offload=none", HOST)}  # fmt: skip
    none, host = peaks.values()
    parameters = measure(load_recipe("quickstart", WIDE, 1).model, 16).parameters
    for usable in (16 * parameters - 1000, (16 * parameters + none) // 2):
        assert host < usable < none
        device = ["--gpus", "1", "--device", f"{usable / 0.92 / GIB:.9f}GiB"]
        refused = plan(*WIDE, *device)
        assert refused.returncode == 2, refused.stderr
        offered = refused.stderr.split("The nearest that fit:")[1].split()
        assert HOST in offered
        assert INTERLEAVED in offered
    assert plan(*WIDE, HOST, *device).returncode == 0
    tiny = plan(*WIDE, "--gpus", "1", "--device", f"{parameters / GIB:.9f}GiB")
    assert "No layout of 1 ranks fits" in tiny.stderr
    assert f"need 18 such devices when all ranks shard them, or 7 with {HOST}" in tiny.stderr


def test_a_host_that_is_too_small() -> None:
    """A byte less than what it holds, of which copies for saving can be left out."""
    fields = ["--gpus", "1", *WIDE, HOST]
    total = sum(report(*fields)["host"].values())
    device = ["--device", "80GiB", "--host-memory", f"{(total - 1) / 0.9 / GIB:.12f}"]
    refused = plan(*fields, *device)
    assert refused.returncode == 2, refused.stderr
    assert "In its host's memory a rank holds" in refused.stderr
    assert all(
        kind in refused.stderr for kind in ("masters", "moments", "gradients", "saved copies")
    )
    assert "rank 0 holds" not in refused.stderr  # the device has enough
    offered = refused.stderr.split("The nearest that fit:")[1]
    assert "optimizer.offload=none" in offered
    assert "optimizer.offload_gradients=bf16" in offered
    assert "optimizer.offload_moments" not in offered  # they are saved wide
    accepted = plan(*fields, "checkpoint.asynchronous=false", *device)
    assert accepted.returncode == 0, accepted.stderr
    assert "left of the host of 80GiB" in accepted.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h100", "--host-memory", "0"], "--host-memory 0: give GiB"),
        (["--device", "h100", "--host-memory", "-1"], "--host-memory -1: give GiB"),
        (["--device", "h100", "--host-memory", "inf"], "--host-memory inf: give GiB"),
        (["--device", "h100", "--host-memory", "nan"], "--host-memory nan: give GiB"),
        (["--device", "h1", "--host-memory", "8"], "--device h1: give one of"),
        (["--host-memory", "8"], "without --device nothing is compared with it"),
    ],
)
def test_bad_amounts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, before anything is built."""
    assert main(["plan", "quickstart", "--gpus", "1", "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_amount(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "quickstart", "--gpus", "1", "--dry-run", "--host-memory", "much"])
    assert ended.value.code == 2
    assert "--host-memory: invalid float value: 'much'" in capsys.readouterr().err


def test_memory_of_hosts() -> None:
    assert all(device.host_memory for device in DEVICES)
    known, given = parse_device("h100"), parse_device("h100", 64)
    assert known is not None
    assert given is not None
    assert (known.host_memory, given.host_memory) == (256 * GIB, 64 * GIB)
    assert 0.85 * 64 * GIB < (given.usable_of_host or 0) < 64 * GIB
    unknown = parse_device("80GiB")
    assert unknown is not None
    assert unknown.usable_of_host is None
    assert parse_device(None) is None


def with_host(found: dict[str, Any], *hosts: dict[str, int]) -> dict[str, Any]:
    return {**found, "stages": [{"host": host} for host in hosts]}


def test_what_is_searched() -> None:
    """Where state alone is too large without offload, every change comes with it."""
    device, asked = Device("80GiB", 80 * GIB, host_memory=100 * GIB), list[Lack]()

    def search(lack: Lack) -> list[Fit]:
        asked.append(lack)
        return [Fit(("a=1",), Held(GIB, 2 * GIB))]

    host = {"masters": 60 * GIB, "moments": 40 * GIB}
    large = report_of_state(200 * GIB, 25 * GIB, optimizer="adamw")  # once 800 GiB, or 300
    cases = [
        (with_host(large, {"saved_copies": 0}), Lack(True, False, True)),
        (report_of_state(100 * GIB, GIB), Lack(True, False)),
        (with_host(report_of_state(GIB, GIB), {"saved_copies": 0}, host), Lack(False, True)),
        (with_host(report_of_state(100 * GIB, GIB), host), Lack(True, True)),
    ]
    for found, lack in cases:
        with pytest.raises(UserError, match=r"\n  a=1  1\.0 GiB, 2\.0 GiB of its host") as refused:
            require_fit(found, device, "a job", search)
        assert asked.pop() == lack
        assert ("(masters 60.0 GiB, moments 40.0 GiB)" in str(refused.value)) == lack.host
    with pytest.raises(UserError, match=r"need 55 such devices .*, or 21 with optimizer.offload"):
        require_fit(report_of_state(GIB * 999, 125 * GIB, optimizer="adamw"), device, "a", search)


def test_changes_for_a_host() -> None:
    tiny = load_recipe("quickstart", ["train.micro_batch=1", "parallel.dp_replicate=2"], 8)
    replicas = [("parallel.dp_replicate=1",)]
    copies = [("checkpoint.asynchronous=false",)]
    assert changes_of_host(tiny, 8) == [replicas, copies]
    moved = tiny.model_copy(update={"optimizer": tiny.optimizer.model_copy(update={
        "offload": "host", "offload_moments": "bf16"})})  # fmt: skip
    assert changes_of_host(moved, 8) == [
        replicas, [("optimizer.offload=none",)], [("optimizer.offload_moments=8bit",)],
        [("optimizer.offload_gradients=bf16",)], copies,
    ]  # fmt: skip


def test_the_order_of_the_search() -> None:
    tiny = load_recipe("quickstart", ["train.micro_batch=1"], 8)
    block = "train.recompute=block"
    orders: dict[Lack, list[Change]] = {
        Lack(True, False): [(), (block,), (block, HOST)],
        Lack(True, False, True): [(HOST,), (HOST, block)],
        Lack(False, True): [()],
        Lack(True, True): [(block,)],
    }
    assert {lack: list(beginnings(tiny, lack)) for lack in orders} == orders
    rows: list[list[Change]] = [[("a=1",), ("a=2",)], [(HOST,)], [(INTERLEAVED, "b=1")]]
    assert joined((HOST,), rows) == [[(HOST, "a=1"), (HOST, "a=2")]]
