"""Memory of a host: what is available, who is refused for it, what a start and its steps say."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks
from test_job import job

from colonnade.launcher.cluster.memory import available_bytes, host_id
from colonnade.launcher.cluster.sizes import listed, size
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train import job as job_module
from colonnade.launcher.train.host_memory import need_of, require_host_memory
from colonnade.launcher.train.job import build_engine, checked_engine
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.reports import offload_metrics
from colonnade.launcher.train.step import Result
from colonnade.launcher.train.summary import describe_offload
from colonnade.models.decoder import Decoder
from colonnade.models.shapes import measure
from colonnade.parallel.engine import Report
from colonnade.parallel.optimizer import OffloadedAdamW
from colonnade.parallel.world import World

CPU = torch.device("cpu")
KERNEL = "optimizer.host_kernel=torch"
HOST = ("train.precision=bf16", "optimizer.offload=host", KERNEL)
INTERLEAVED = ("train.precision=bf16", "optimizer.offload=interleaved", KERNEL)


def file_system(root: Path, files: dict[str, str]) -> Path:
    meminfo = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1000 kB\n"}
    for name, text in {**meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(limit: str, used: int, cached: int, version: int = 2) -> dict[str, str]:
    """Files of a control group: of its cache a half is active."""
    half, prefix = cached // 2, "total_" if version == 1 else ""
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    return {
        f"memory.{names[0]}": f"{limit}\n",
        f"memory.{names[1]}": f"{used}\n",
        "memory.stat": f"anon 7\n{prefix}inactive_file {half}\n{prefix}active_file {half}\n",
    }


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
PATHS = "proc/self/cgroup"
ABOVE = group("5000", 4000, 600)  # leaves 1600


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        # no limit in the job's own group, or one that is used up
        ({PATHS: "0::/a/b\n", **below(f"{V2}/a/b", group("max", 5, 0)), **below(f"{V2}/a", ABOVE)},
         1600),
        ({PATHS: "0::/a/b\n", **below(f"{V2}/a/b", group("9", 9, 0)), **below(f"{V2}/a", ABOVE)},
         0),
        # in a container, which sees its own group at the top
        ({PATHS: "4:cpu,memory:/docker/1f\n0::/\n", **below(V1, group("7000", 100, 100, 1))}, 7000),
        ({PATHS: "4:memory:/\n", **below(V1, group(str(2**63), 100, 0, 1))}, 1000 * 1024),
    ],
)  # fmt: skip
def test_available_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """The least of what the kernel says, and of what each control group leaves."""
    root = file_system(tmp_path, files)
    assert available_bytes(root) == expected


def test_available_memory_of_this_machine(tmp_path: Path) -> None:
    """Without /proc all of it, of which a part is available with it."""
    everything = available_bytes(tmp_path)
    assert 0 < available_bytes() <= everything
    assert host_id() == host_id()
    assert host_id(tmp_path) == (host_id()[0], "")


@contextmanager
def hosts(available: int, ranks_of_one: int, rank: int) -> Iterator[None]:
    """Makes so many ranks share a host with this memory."""
    check = partial(
        require_host_memory,
        available=lambda: available,
        host=lambda: (f"node{rank // ranks_of_one}", ""),
    )
    with patch.object(job_module, "require_host_memory", check):
        yield


def started(rank: int, size: int, recipe: Recipe, available: int, ranks_of_one: int) -> str:
    """Builds an engine as a job does; returns why that is refused, or nothing."""
    with hosts(available, ranks_of_one, rank):
        try:
            engine = checked_engine(recipe, World(rank, size, CPU))
        except UserError as error:
            return str(error)
    assert isinstance(engine.optimizer, OffloadedAdamW)
    return ""


def needs(rank: int, size: int, recipe: Recipe) -> dict[str, int]:
    """What a rank needs, by kind."""
    found: list[dict[str, int]] = []

    def check(model: Decoder) -> None:
        found.append(need_of(model, recipe, 0, ("", "")).kinds)

    build_engine(recipe, World(rank, size, CPU), check=check)
    return found[0]


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.dp_replicate=2", "parallel.pp=2"])
def test_a_host_without_the_memory_is_refused_on_all_ranks(
    ranks4: Ranks, recipe: Callable[..., Recipe], layout: str
) -> None:
    """Two hosts of two ranks each: what the larger one needs is enough, and a byte less is not."""
    settings = recipe(*HOST, layout)
    of_ranks = ranks4.run(needs, settings)
    of_hosts = [
        {k: a[k] + b[k] for k in a} for a, b in zip(of_ranks[::2], of_ranks[1::2], strict=True)
    ]
    largest = max(of_hosts, key=lambda kinds: sum(kinds.values()))
    total = sum(largest.values())
    assert ranks4.run(started, settings, total, 2) == [""] * 4
    messages = ranks4.run(started, settings, total - 1, 2)
    assert len(set(messages)) == 1
    (message,) = set(messages)
    assert (
        f"optimizer.offload = host: 2 ranks on host node{of_hosts.index(largest)} need" in message
    )
    assert f"need {size(total)} of its memory ({listed(largest)})" in message
    assert f"and {size(total - 1)} are available" in message
    assert "optimizer.offload=none, where each device has room for" in message
    assert "3 hosts as this one" in message


def test_remedies_that_are_offered_fit(ranks2: Ranks, recipe: Callable[..., Recipe]) -> None:
    """Narrow gradients and no copies for saving do; narrow moments do not, which are saved wide."""
    settings = recipe(*HOST)
    available = sum(sum(kinds.values()) for kinds in ranks2.run(needs, settings)) - 1
    (message,) = set(ranks2.run(started, settings, available, 2))
    for field in ("optimizer.offload_gradients=bf16", "checkpoint.asynchronous=false"):
        assert f"{field} (" in message
        assert ranks2.run(started, recipe(*HOST, field), available, 2) == ["", ""]
    assert "optimizer.offload_moments" not in message
    assert all(ranks2.run(started, recipe(*HOST, "optimizer.offload_moments=bf16"), available, 2))


def test_nothing_is_compared_without_offload(ranks1: Ranks, recipe: Callable[..., Recipe]) -> None:
    def never() -> int:
        raise AssertionError("the host was asked")

    require_host_memory(Decoder(recipe().model), recipe(), World(0, 1, CPU), never)


def test_replicas_are_saved_once(ranks4: Ranks, recipe: Callable[..., Recipe]) -> None:
    """Of fp32 weights and two moments."""
    settings = recipe(*HOST, "parallel.dp_replicate=2")
    saves = [kinds["saved_copies"] for kinds in ranks4.run(needs, settings)]
    assert sum(saves) == 12 * measure(settings.model, settings.train.seq_len).parameters
    assert sorted(saves)[:2] == [0, 0]


def printed(rank: int, size: int, recipe: Recipe, run: Path) -> str:
    """Runs a job; returns what it prints."""
    with redirect_stdout(StringIO()) as output:
        job(rank, size, recipe, run)
    return output.getvalue()


def test_a_run_says_where_its_state_is(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """At its start in two lines, in every step by two figures."""
    output, nothing = ranks2.run(printed, recipe(*INTERLEAVED, "train.steps=3"), tmp_path / "moved")
    assert not nothing
    (line,) = (text for text in output.splitlines() if text.startswith("offload"))
    groups, updated = (int(word) for word in line.split() if word.isdecimal())
    assert line.startswith(
        f"offload     interleaved: {groups} groups, {updated} updated on the dev"
    )
    assert "kernel torch: torch's fused operator" in line
    assert 0 < updated < groups
    (below,) = (text for text in output.splitlines() if text.startswith("            host"))
    assert "a rank (masters" in below
    assert "on the device at most 2 slots of" in below
    assert "the device's memory is the host's own" in below
    rows = [row for row in read_metrics(tmp_path / "moved/metrics.jsonl") if "loss" in row]
    assert [row["offload_device_groups"] for row in rows] == [updated] * 3
    assert all(0 < row["offload_update_s"] <= row["parts"]["update"] for row in rows)
    assert not any("offload_predicted_s" in row for row in rows)


def test_a_run_on_the_device_says_nothing_of_it(
    ranks1: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (output,) = ranks1.run(printed, recipe("train.steps=1"), tmp_path / "device")
    assert "offload" not in output
    assert "offload" not in (tmp_path / "device/metrics.jsonl").read_text()


def result_of(grad_norm: float) -> Result:
    return Result(Report(1.0, 0.0, {}, grad_norm, 8, {}), 0.1)


def figures(rank: int, size: int, recipe: Recipe) -> tuple[list[dict[str, float]], str]:
    """Metrics before an update, of one on a GPU, and of a skipped step; and the start there."""
    optimizer = build_engine(recipe, World(rank, size, CPU)).optimizer
    assert isinstance(optimizer, OffloadedAdamW)
    found = [offload_metrics(optimizer, result_of(1.0))]
    optimizer.device = torch.device("cuda")
    optimizer.placer.predicted = 0.25
    optimizer.update(0.1, 1.0)
    found += [offload_metrics(optimizer, result_of(norm)) for norm in (1.0, float("nan"))]
    optimizer.refit = True
    return found, describe_offload(optimizer, optimizer.device)


def test_figures_of_a_gpu(ranks1: Ranks, recipe: Callable[..., Recipe]) -> None:
    """Its placement follows what is measured, and its updates are predicted."""
    (((before, taken, skipped), text),) = ranks1.run(figures, recipe(*INTERLEAVED))
    assert before == skipped == {}
    assert taken["offload_predicted_s"] == 0.25
    assert taken["offload_update_s"] > 0
    assert taken["offload_device_groups"] > 0
    assert "groups, as many as the first step shows to pay updated on the device" in text
    assert "on the device slots of at most" in text
    assert "margin 1 GiB" in text
    assert "the host's own" not in text
