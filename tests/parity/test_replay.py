"""Replayed micro-batches: a flipped bit is found on its rank, and training is as without them."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import RankError, Ranks, pool
from tiny import VOCAB, MakeRecipe, tiny_recipe

from colonnade.launcher.data import IndexedWriter
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.events import read_events
from colonnade.launcher.train.guard import replay
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.metrics import read_metrics
from colonnade.models.decoder import Decoder
from colonnade.parallel.gradients import local
from colonnade.parallel.replay import Recording, checksum, gathered_parameters
from colonnade.parallel.world import World


@pytest.fixture
def recipe(tmp_path: Path) -> MakeRecipe:
    """A tiny recipe with overrides, which replays every second step."""
    generator = torch.Generator().manual_seed(3)
    with IndexedWriter(tmp_path / "tokens", token_dtype(VOCAB)) as writer:
        for _ in range(100):
            writer.add(torch.randint(0, VOCAB, (30,), generator=generator).numpy())
    fields = ("data.validation=0", "train.steps=4", "train.global_batch=12",
              "train.deterministic=true", "guard.replay_every=2")  # fmt: skip
    return tiny_recipe(tmp_path, tmp_path / "tokens", *fields)


def job(rank: int, size: int, recipe: Recipe, run: Path) -> None:
    """Runs a job on one rank."""
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True)
        (run / "recipe.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    run_job(recipe, run, World(rank, size, torch.device("cpu")))


def flip_bit(t: torch.Tensor) -> torch.Tensor:
    """Flips the lowest bit of a tensor's last element, in place; returns the tensor."""
    t.detach().view(torch.int32).view(-1)[-1].bitwise_xor_(1)
    return t


def flip_gradient(parameter: torch.Tensor) -> None:
    """Flips a bit of a parameter's gradient."""
    assert parameter.grad is not None
    flip_bit(local(parameter.grad))


def faulty_job(
    rank: int, size: int, recipe: Recipe, run: Path, faulty: int, calls: set[int], at: str
) -> None:
    """Runs a job in which one rank is faulty in some of its repeated passes, counted from 0: the
    output of the module at `at`, or the gradient of the weight of this name, has a wrong bit."""
    repeat, count = replay.repeat, 0

    def repeat_with_fault(model: Decoder, *arguments: Any) -> Recording:
        nonlocal count
        handles = []
        if rank == faulty and count in calls:
            modules = dict(model.named_modules())
            if at in modules:
                hook = modules[at].register_forward_hook(lambda *args: flip_bit(args[2].clone()))
            else:
                names = dict((p, name) for name, p in model.named_parameters())
                (weight,) = (g for p, g in gathered_parameters(model) if names[p] == at)
                hook = weight.register_post_accumulate_grad_hook(flip_gradient)
            handles.append(hook)
        count += 1
        try:
            return repeat(model, *arguments)
        finally:
            for handle in handles:
                handle.remove()

    with mock.patch.object(replay, "repeat", repeat_with_fault):
        job(rank, size, recipe, run)


SECOND = "wiring.blocks.1.second"
ALWAYS = {0, 1, 2}

# layout, ranks, the faulty one, the passes, where; pairs, suspects, the result
FAULTS: dict[str, tuple[Any, ...]] = {
    "dp=2": ((), 2, 1, ALWAYS, SECOND,
             [[0, 1], [1, 0]], [], "the forward pass of blocks.1.second"),
    "dp=2, own alone": ((), 2, 1, {0}, SECOND,
                        [[1, 0]], [], "the forward pass of blocks.1.second"),
    "dp=2, replay alone": ((), 2, 1, {1}, SECOND,
                           [[0, 1]], [], "the forward pass of blocks.1.second"),
    "dp=2, a weight's gradient": ((), 2, 0, {1}, "blocks.0.q",
                                  [[1, 0]], [], "the gradient of blocks.0.q"),
    "dp=2, tp=2": (("parallel.tp=2",), 4, 3, ALWAYS, SECOND,
                   [[1, 3], [3, 1]], [], "the forward pass of blocks.1.second"),
    "dp=2, tp=2, a gradient": (("parallel.tp=2",), 4, 2, {0}, "blocks.1.up",
                               [[2, 0]], [], "the gradient of blocks.1.up"),
    "pp=2, dp=2": (("parallel.pp=2",), 4, 3, ALWAYS, SECOND,
                   [[2, 3], [3, 2]], [], "the forward pass of blocks.1.second"),
    "pp=2, dp=2, first stage": (("parallel.pp=2",), 4, 1, {1}, "embedding",
                                [[0, 1]], [], "the forward pass of embedding"),
    "dp=3": ((), 3, 1, ALWAYS, SECOND,
             [[0, 1], [1, 2]], [1], "the forward pass of blocks.1.second"),
    "dp=3, own alone": ((), 3, 2, {0}, "blocks.1.down",
                        [[2, 0]], [2], "the gradient of blocks.1.down"),
    "dp=3, replay alone": ((), 3, 0, {1}, SECOND,
                           [[2, 0]], [0], "the forward pass of blocks.1.second"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_flipped_bit_is_found_on_its_rank(recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    overrides, size, faulty, calls, at, pairs, suspects, result = FAULTS[name]
    run = tmp_path / "run"
    with pytest.raises(RankError) as failed:
        pool(size).run(faulty_job, recipe(*overrides), run, faulty, calls, at)
    told = str(failed.value)
    assert told.count(f"step 2: rank {pairs[0][0]} (") == size
    assert f"first in {result}" in told
    (event,) = [e for e in read_events(run) if e["event"] == "replay"]
    assert (event["step"], event["pairs"], event["suspects"]) == (2, pairs, suspects)
    assert event["result"] == result
    if suspects:
        assert f"contradicts rank {suspects[0]}" in told
    assert not list((run / "checkpoints").iterdir())


STATEFUL = (
    "model.pattern=ETM-*", "model.experts=4", "model.router_bias=true", "model.router_noise=0.5",
    "model.sigma_reparam=true", "model.mamba_head_dim=8", "model.mamba_state=4", "model.mtp=1",
    "optimizer.warmup=2", "train.steps=3",
)  # fmt: skip
ONE_ROW = "train.micro_batch=1"
SOUND: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp=2, state": (2, STATEFUL),
    "dp=2, elastic, bf16": (2, ("train.precision=bf16", "train.global_batch=10",
                                "parallel.elastic=true")),
    "dp=2, offload": (2, ("optimizer.offload=host", "train.recompute=selective")),
    "HSDP, recompute": (4, ("parallel.dp_replicate=2", "train.recompute=block", ONE_ROW)),
    "dp=2, tp=2, ladder": (4, ("parallel.tp=2", "parallel.sequence=true", "model.residual=ladder")),
    "dp=2, cp=2": (4, ("parallel.cp=2", "model.pattern=M*-", "model.mamba_head_dim=8")),
    "dp=4, ep=2": (4, ("parallel.ep=2", "model.pattern=*E", "model.experts=4", ONE_ROW)),
    "dp=2, tp=2, ep=2": (4, ("parallel.tp=2", "parallel.ep=2", "parallel.etp=1",
                             "model.pattern=*E", "model.experts=4")),
    "pp=2, dp=2, zero bubble": (4, ("parallel.pp=2", "parallel.schedule=zbv", "model.repeat=2",
                                    "model.tied=true", ONE_ROW)),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_training_is_bit_equal_to_that_without_replays(
    recipe: MakeRecipe, tmp_path: Path, name: str
) -> None:
    """And sound ranks compute alike: nothing is found."""
    size, overrides = SOUND[name]
    saved = {}
    for every in (1, 0):
        run = tmp_path / str(every)
        settings = recipe(*overrides, f"guard.replay_every={every}")
        pool(size).run(job, settings, run)
        (folder,) = (run / "checkpoints").iterdir()
        rows = read_metrics(run / "metrics.jsonl")
        figures = [(row["loss"], row["grad_norm"], row.get("loads")) for row in rows if "lr" in row]
        assert all(("replay" in row["parts"]) == bool(every) for row in rows if "lr" in row)
        tensors = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        saved[every] = figures, tensors, (folder / "state.json").read_bytes()
    assert saved[1] == saved[0]


def test_a_checksum_sees_every_bit(ranks2: Ranks) -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
        t = torch.randn(7, 5, generator=generator).to(dtype)
        other = t.clone()
        other[3, 2] = not other[3, 2] if dtype == torch.bool else other[3, 2] + 1
        assert checksum(t) == checksum(t.T) != checksum(other), dtype
    nan = torch.full((3,), torch.nan)
    assert checksum(nan) == checksum(nan.clone()) != checksum(torch.ones(3))
