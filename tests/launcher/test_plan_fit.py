"""Plans compared with the memory of a device."""

import json
import subprocess
import sys
from typing import Any

import pytest

from colonnade.launcher.cli import main
from colonnade.launcher.cluster.devices import DEVICES, GIB, Device, parse_device, peak_flops
from colonnade.launcher.errors import UserError
from colonnade.launcher.plan.fit import (
    Change,
    Fit,
    Held,
    changes,
    first_fit,
    ranks_for_state,
    require_fit,
)
from colonnade.launcher.recipe.load import load_recipe

TINY = [
    "model.pattern=*-", "model.repeat=4", "model.hidden=32", "train.seq_len=64",
    "train.micro_batch=4", "train.global_batch=32", "train.recompute=none",
]  # fmt: skip


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "colonnade.launcher", "plan", "quickstart", "--dry-run"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(
    ("text", "memory"),
    [("80GiB", 80 * GIB), ("1.5 gib", 3 * GIB // 2), ("24GB", 24 * 10**9),
     *((device.name.upper(), device.memory) for device in DEVICES)],
)  # fmt: skip
def test_devices(text: str, memory: int) -> None:
    device = parse_device(text)
    assert device is not None
    assert device.memory == memory
    assert 0.9 * memory < device.usable < memory


@pytest.mark.parametrize("text", ["h1000", "80", "0GiB", "-1GiB", ""])
def test_unknown_devices(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--gpus", "8", "--dry-run", f"--device={text}"]) == 2
    message = capsys.readouterr().err
    assert f"--device {text}: give one of a100-40gb," in message
    assert "80GiB" in message


def test_peaks_by_the_names_of_drivers() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == peak_flops("NVIDIA A100 80GB PCIe") == 312e12
    assert peak_flops("NVIDIA GH200 480GB") is None  # a name that holds that of another one
    assert peak_flops("NVIDIA GeForce GTX 1080") is None


def test_what_does_not_fit_is_refused() -> None:
    """The message has the parts, and each remedy in it is accepted with the peak it promises."""
    device = ["--gpus", "8", "--device", "0.0045GiB"]
    refused = plan(*TINY, *device)
    assert refused.returncode == 2, refused.stderr
    assert "quickstart on 8 ranks: rank 0 holds" in refused.stderr
    head, *lines = refused.stderr.split("The nearest that fit:")[1].strip().splitlines()
    fits = [line.split() for line in [head, *lines] if "MiB" in line]
    # which of the two is a matter of the processor, by which products are divided among libraries
    assert any(fit[0].startswith("train.recompute=") for fit in fits)
    assert ["parallel.cp=2"] in [fit[:-2] for fit in fits]
    accepted = plan(*TINY, *fits[-1][:-2], *device)
    assert accepted.returncode == 0, accepted.stderr
    assert "left of 0.0045GiB" in accepted.stdout


def report(
    peak: int, parameters: int, ranks: int = 8, precision: str = "bf16", optimizer: str = "muon"
) -> dict[str, Any]:
    """A plan of a rank that holds an eighth of the parameters, of four or eight bytes each."""
    state = {"parameters": parameters, "gradients": parameters, "optimizer": 2 * parameters}
    elements = parameters // (8 if precision == "fp64" else 4)
    return {
        "rank": 3, "ranks": ranks, "memory": {**state, "peak": peak}, "parameters": 8 * elements,
        "elements": elements, "precision": precision, "optimizer": optimizer, "offload": "none",
        "stages": [{"host": {"saved_copies": 0}}],
    }  # fmt: skip


def test_state_that_no_layout_shards_enough() -> None:
    """A rank holds four times 10 GiB; once, that is 320 GiB, of which a device has 73.6."""
    device = Device("80GiB", 80 * GIB)
    assert ranks_for_state(report(100 * GIB, 10 * GIB), device) == 5
    assert ranks_for_state(report(100 * GIB, 20 * GIB, precision="fp64"), device) == 9
    large = report(1000 * GIB, 240 * GIB)
    with pytest.raises(UserError, match=r"No layout of 8 ranks fits: .* need 105 such devices"):
        require_fit(large, device, "a job", lambda lack: pytest.fail("nothing to search"))


def test_copies_of_parameters_do_not_count() -> None:
    """Two stages both hold a tied embedding: no more devices are needed for that."""
    tied = ["quickstart", "--gpus", "8", "model.tied=true", "model.pattern=*-", "model.repeat=1"]
    counts = []
    for layout in ("parallel.pp=1", "parallel.pp=2"):
        result = plan(*tied[1:], layout, "train.micro_batch=1", "--json", "-")
        assert result.returncode == 0, result.stderr
        counts.append(ranks_for_state(json.loads(result.stdout), Device("tiny", 50_000)))
    assert counts[0] == counts[1] > 8


def test_nothing_fits() -> None:
    device = Device("80GiB", 80 * GIB)
    with pytest.raises(UserError, match="use more ranks, or a device with more memory"):
        require_fit(report(75 * GIB, GIB), device, "a job", lambda lack: [])
    require_fit(report(device.usable, GIB), device, "a job", lambda lack: pytest.fail("it fits"))


def test_changes_of_each_field() -> None:
    layout = ["parallel.dp_replicate=2", "parallel.dp_shard=4", "train.recompute=selective"]
    rows = changes(load_recipe("quickstart", [*TINY[:-1], *layout], 8), 8)
    assert rows == [
        [("train.recompute=block",)],
        [("train.offload_inputs=true",)],
        [("train.micro_batch=2",), ("train.micro_batch=1",)],
        [("parallel.dp_replicate=1", "parallel.dp_shard=8")],
        *([("parallel.dp_shard=2", f"parallel.{axis}=2"),
           ("parallel.dp_shard=1", f"parallel.{axis}=4")] for axis in ("tp", "cp", "pp")),
        [(f"parallel.ep={degree}",) for degree in (2, 4, 8, 16)],
        [("optimizer.offload=host",)],
        [("optimizer.offload=interleaved",)],
    ]  # fmt: skip


def test_the_first_change_that_fits() -> None:
    large, small = Held(2 * GIB, 0), Held(GIB // 2, GIB)
    results: dict[str, Held | None] = {"a": large, "b": None, "c": small, "d": Held(1, 0)}
    tried: list[str] = []

    def held(change: Change) -> Held | None:
        tried.append(change[0])
        return results[change[0]]

    device, row = Device("1GiB", GIB), [("a",), ("b",), ("c",), ("d",)]
    assert first_fit(held, device, row) == Fit(("c",), small)
    assert tried == ["a", "b", "c"]
    assert first_fit(held, device, row[:2]) is None
    assert first_fit(held, Device("1GiB", GIB, host_memory=GIB), row) == Fit(("d",), Held(1, 0))
