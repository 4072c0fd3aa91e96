"""Runs with optimizer state in the host's memory: saved, resumed, begun from weights, frozen."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from ranks import Ranks
from test_job import job, losses

from colonnade.launcher.recipe.stages import training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_engine
from colonnade.launcher.train.schedule import micro_batches
from colonnade.launcher.train.step import train_step
from colonnade.launcher.verify.trace import random_rows
from colonnade.parallel.lanes.pinned import PinnedMemoryError
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.optimizer.offload.memory import slab_of
from colonnade.parallel.world import World

KERNEL = "optimizer.host_kernel=torch"
INTERLEAVED, HOST = ("optimizer.offload=interleaved", KERNEL), ("optimizer.offload=host", KERNEL)
BF16 = ("train.precision=bf16", "train.steps=10")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_goes_on_with_state_anywhere(
    ranks1: Ranks,
    ranks2: Ranks,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    precision: str,
) -> None:
    """The device, the host, both, the device again: the losses of a run on the device."""
    fields = (f"train.precision={precision}", "train.steps=8")
    ranks2.run(job, recipe(*fields), tmp_path / "device")
    run = tmp_path / "moved"
    ranks2.run(job, recipe(*fields), run, False, 2)
    ranks2.run(job, recipe(*fields, *HOST), run, True, 4)
    ranks2.run(job, recipe(*fields, *INTERLEAVED), run, True, 6)
    ranks2.run(job, recipe(*fields), run, True)
    assert losses(run) == losses(tmp_path / "device")


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_narrow_moments_are_saved_and_resumed_on_other_ranks(
    ranks1: Ranks, ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path, moments: str
) -> None:
    """A resumed run goes on as an uninterrupted one, on other ranks and without offload nearly."""
    fields = (*BF16, *INTERLEAVED, f"optimizer.offload_moments={moments}")
    ranks2.run(job, recipe(*fields), tmp_path / "whole")
    for name in ("same", "other", "device"):
        ranks2.run(job, recipe(*fields), tmp_path / name, False, 4)
    ranks2.run(job, recipe(*fields), tmp_path / "same", True)
    ranks1.run(job, recipe(*fields), tmp_path / "other", True)
    ranks1.run(job, recipe(*BF16), tmp_path / "device", True)
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "same") == expected
    assert losses(tmp_path / "other") == pytest.approx(expected, rel=0.02)
    assert losses(tmp_path / "device") == pytest.approx(expected, rel=0.02)


def test_resuming_on_another_layout_with_state_anywhere(
    ranks1: Ranks,
    ranks2: Ranks,
    ranks4: Ranks,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    fields = ("train.precision=fp64", "model.experts=4", "train.steps=8")
    ranks1.run(job, recipe(*fields), tmp_path / "one")
    run = tmp_path / "moved"
    ranks2.run(job, recipe(*fields, *INTERLEAVED, "parallel.tp=2"), run, False, 2)
    ranks4.run(job, recipe(*fields, *HOST, "parallel.pp=2"), run, True, 4)
    ranks4.run(job, recipe(*fields, *INTERLEAVED, "parallel.ep=2", "parallel.cp=2"), run, True, 6)
    ranks1.run(job, recipe(*fields), run, True)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-10)


def test_stages_freeze_and_thaw_16_bit_weights_without_rounding_them(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Frozen weights keep their fp32 values on the host, which a later stage trains on."""
    stages = (
        "train.precision=bf16", "stage.0.steps=2", "stage.1.steps=2",
        "stage.1.train.freeze=['embedding.*','blocks.[02].*']", "stage.2.steps=3",
    )  # fmt: skip
    ranks2.run(job, recipe(*stages), tmp_path / "device")
    ranks2.run(job, recipe(*stages, *INTERLEAVED), tmp_path / "moved")
    assert losses(tmp_path / "moved") == losses(tmp_path / "device")


def test_stages_move_the_state(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Each stage keeps it elsewhere, saved after every step."""
    stages = (
        "train.precision=bf16",
        "checkpoint.every=1",
        *(f"stage.{n}.steps=2" for n in range(3)),
    )
    moves = (
        "stage.0.optimizer.offload=host", "stage.2.optimizer.offload=interleaved",
        "stage.0.optimizer.host_kernel=torch", "stage.2.optimizer.host_kernel=torch",
    )  # fmt: skip
    ranks2.run(job, recipe(*stages), tmp_path / "device")
    ranks2.run(job, recipe(*stages, *moves), tmp_path / "moved")
    assert losses(tmp_path / "moved") == losses(tmp_path / "device")


def freed(rank: int, size: int, recipe: Recipe) -> bool:
    """Whether an optimizer that has trained a step is freed with its engine."""
    engine = build_engine(recipe, World(rank, size, torch.device("cpu")))
    (stage,) = training_stages(recipe)
    samples = micro_batches(stage, 0, *data_rank(engine.mesh))
    rows = [random_rows(s, recipe.model.vocab, recipe.train.seq_len) for s in samples]
    train_step(engine, rows, samples, stage, 0)
    optimizer = weakref.ref(engine.optimizer)
    del engine
    gc.collect()
    return optimizer() is None


def test_the_state_is_freed_with_its_engine(ranks2: Ranks, recipe: Callable[..., Recipe]) -> None:
    """As at a change of the training stage."""
    assert ranks2.run(freed, recipe(*BF16, *INTERLEAVED)) == [True, True]


def test_training_begins_from_the_exact_values_of_weights(
    ranks2: Ranks, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    ranks2.run(job, recipe("train.steps=2", "train.precision=fp32"), tmp_path / "weights")
    init = f"train.init={tmp_path / 'weights/checkpoints/step-00000002'}"
    fields = (init, "train.precision=bf16", "train.steps=3")
    ranks2.run(job, recipe(*fields), tmp_path / "device")
    ranks2.run(job, recipe(*fields, *INTERLEAVED), tmp_path / "moved")
    assert losses(tmp_path / "moved") == losses(tmp_path / "device")


class Driver:
    """A driver that pins memory, or none where its limit is 0."""

    pinned: ClassVar[list[int]] = []
    status = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.status:
            self.pinned.append(address)
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns and goes on with pageable memory, or refuses."""
    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(Driver, "status", 2)
    device = torch.device("cuda")
    with pytest.raises(PinnedMemoryError, match=r"optimizer.pinned = require: .*1\.00 GiB.*prefer"):
        slab_of(1 << 30, device, "require")
    with pytest.warns(UserWarning, match="two to three times as slow"):
        slab = slab_of(1 << 20, device, "prefer")
    assert slab.numel() == 1 << 20


def test_memory_is_unpinned_when_its_last_tensor_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    slabs = [slab_of(1 << 20, torch.device("cuda"), "require") for _ in range(2)]
    assert Driver.pinned == [slab.data_ptr() for slab in slabs]
    view, slabs = slabs[1][5:7], []
    assert Driver.pinned == [view.data_ptr() - 5]
    del view
    assert not Driver.pinned
