"""Checkpoints on disk: bit-equal on any layout, intact after any failure, clear about damage."""

import functools
import json
import logging
import math
import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import Ranks
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from colonnade.launcher import checkpoint
from colonnade.launcher.checkpoint import newest, prune, read_state, step_folder
from colonnade.launcher.checkpoint.catalog import Chunk, read_catalog
from colonnade.launcher.checkpoint.read import read_box
from colonnade.launcher.errors import UserError

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel("WARNING")  # it logs every call

Tensors = dict[str, torch.Tensor]
STATE = {"step": 10, "data": {"seen": [1, 2]}, "recipe": "größe"}
MiB = 1 << 20


def values(seed: int) -> Tensors:
    """Returns one global tensor for each case, drawn from `seed`."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return {
        "uneven": draw(7, 3),
        "empty_shards": draw(2, 5).bfloat16(),
        "grid": draw(5, 6, dtype=torch.float64),
        "columns": draw(3, 9),
        "same": draw(4, 4).half(),
        "count": torch.tensor(seed + 3),
        "scalar": draw(()),
        "scalar_placed": draw(()).bfloat16(),
        "none": draw(0, 4),
        "mask": draw(6) > 0,
        "transposed": draw(3, 5).T,
        "up.weight": draw(10, 6),
        "up.bias": draw(10),
        "down.weight": draw(6, 10),
        "down.bias": draw(6),
    }


PLACEMENTS = {  # over a mesh of two dimensions; names without an entry are plain tensors
    "uneven": (Replicate(), Shard(0)),
    "empty_shards": (Shard(0), Shard(0)),
    "grid": (Shard(0), Shard(1)),
    "columns": (Shard(1), Replicate()),
    "same": (Replicate(), Replicate()),
    "scalar_placed": (Replicate(), Replicate()),
    "none": (Shard(0), Shard(1)),
}


def distribute(full: Tensors, mesh_shape: tuple[int, int]) -> Tensors:
    """Shards `full` over a mesh (dp, tp) by PLACEMENTS, and two linear layers by TP and FSDP."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp"))
    tensors = {
        name: distribute_tensor(tensor, mesh, PLACEMENTS[name], src_data_rank=None)
        if name in PLACEMENTS
        else tensor.clone()
        for name, tensor in full.items()
        if "." not in name
    }
    model = nn.Sequential()
    for name, (d_in, d_out) in {"up": (6, 10), "down": (10, 6)}.items():
        model.add_module(name, nn.Linear(d_in, d_out))
    model.load_state_dict({name: tensor for name, tensor in full.items() if "." in name})
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return tensors | model.state_dict()


@contextmanager
def pickling_refused() -> Iterator[None]:
    """Makes torch.save and torch.load fail, which would pickle."""
    with mock.patch("torch.save", side_effect=AssertionError), mock.patch("torch.load") as load:
        load.side_effect = AssertionError
        yield


def save_distributed(rank: int, size: int, folder: Path, mesh_shape: tuple[int, int]) -> list[str]:
    tensors = distribute(values(1), mesh_shape)
    with pickling_refused():
        checkpoint.save(folder, tensors, STATE)
    return [str(t.placements) for t in tensors.values() if isinstance(t, DTensor)]


def load_distributed(rank: int, size: int, folder: Path, mesh_shape: tuple[int, int]) -> list[str]:
    """Loads onto a mesh; returns the tensors whose local shards differ from `values(1)`."""
    tensors, expected = distribute(values(2), mesh_shape), distribute(values(1), mesh_shape)
    with pickling_refused():
        assert checkpoint.load(folder, tensors) == STATE
    return different(tensors, expected)


def different(tensors: Tensors, expected: Tensors) -> list[str]:
    """Returns the names of tensors whose local shards are not bit-equal."""

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    return [
        name for name in expected if not torch.equal(local(tensors[name]), local(expected[name]))
    ]


def check_in_one_process(folder: Path) -> None:
    """Loads the checkpoint in this process and compares every tensor with `values(1)`."""
    tensors = values(2)
    assert checkpoint.load(folder, tensors) == STATE
    assert different(tensors, values(1)) == []


def test_saved_on_four_loads_on_any_layout(tmp_path: Path, ranks4: Ranks, ranks2: Ranks) -> None:
    folder = step_folder(tmp_path, 10)
    placements = ranks4.run(save_distributed, folder, (2, 2))
    assert any("_StridedShard" in placement for placement in placements[0])
    for mesh_shape in ((2, 2), (4, 1), (1, 4)):
        assert ranks4.run(load_distributed, folder, mesh_shape) == [[]] * 4
    for mesh_shape in ((2, 1), (1, 2)):
        assert ranks2.run(load_distributed, folder, mesh_shape) == [[]] * 2
    check_in_one_process(folder)


def test_saved_on_one_and_two_loads_on_four(tmp_path: Path, ranks4: Ranks, ranks2: Ranks) -> None:
    checkpoint.save(step_folder(tmp_path, 1), values(1), STATE)
    ranks2.run(save_distributed, step_folder(tmp_path, 2), (2, 1))
    for step in (1, 2):
        assert ranks4.run(load_distributed, step_folder(tmp_path, step), (2, 2)) == [[]] * 4


def test_files_are_safetensors_and_json_only(tmp_path: Path, ranks4: Ranks) -> None:
    folder = step_folder(tmp_path, 10)
    ranks4.run(save_distributed, folder, (2, 2))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    stored_bytes = 0
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=pytest.fail)
            continue
        assert path.suffix == ".safetensors"
        content = path.read_bytes()
        (header,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + header])
        entries.pop("__metadata__", None)
        ends = sorted(entry["data_offsets"] for entry in entries.values())
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert 8 + header + ends[-1][1] == len(content)
        stored_bytes += ends[-1][1]
    # Each element is stored by one rank only.
    assert stored_bytes == sum(tensor.nbytes for tensor in values(1).values())
    catalog = json.loads((folder / "tensors.json").read_text())["tensors"]
    assert {name: entry["shape"] for name, entry in catalog.items()} == {
        name: list(tensor.shape) for name, tensor in values(1).items()
    }


def save_and_load_stages(rank: int, size: int, folder: Path, wrong: bool) -> str:
    """Each rank saves and loads other names, as pipeline stages do; both ranks hold `both`."""
    tensors = {f"stage{rank}": torch.full((3,), float(rank)), "both": torch.tensor(rank)}
    checkpoint.save(folder, tensors, {})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    if wrong and rank == 1:
        loaded["other"] = torch.zeros(3, 3)
    try:
        checkpoint.load(folder, loaded)
    except UserError as error:
        return str(error)
    assert torch.equal(loaded[f"stage{rank}"], tensors[f"stage{rank}"])
    assert loaded["both"] == 0  # rank 0's is written
    return ""


def test_ranks_may_hold_different_tensors(tmp_path: Path, ranks2: Ranks) -> None:
    assert ranks2.run(save_and_load_stages, step_folder(tmp_path, 1), False) == ["", ""]
    first, second = ranks2.run(save_and_load_stages, step_folder(tmp_path, 1), True)
    assert first == second
    assert "not in the checkpoint (1): other" in first


def save_strided_shard(rank: int, size: int, folder: Path) -> str:
    """Saves a tensor whose shards are strided; returns the error."""
    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.zeros(4), mesh, [_StridedShard(0, split_factor=2)])
    try:
        checkpoint.save(folder, {"w": tensor}, {})
    except ValueError as error:
        return str(error)
    return ""


def test_a_shard_that_is_not_contiguous_is_refused(tmp_path: Path, ranks2: Ranks) -> None:
    messages = ranks2.run(save_strided_shard, step_folder(tmp_path, 1))
    assert all("w with" in message for message in messages)


def test_several_chunks_of_a_tensor_on_one_rank(tmp_path: Path) -> None:
    full = values(1)["uneven"]
    chunks = LocalShardsWrapper([full[:, :1], full[:, 1:]], [(0, 0), (0, 1)])
    checkpoint.save(step_folder(tmp_path, 1), {"w": chunks}, {})
    loaded = torch.zeros(7, 3)
    checkpoint.load(step_folder(tmp_path, 1), {"w": loaded})
    assert torch.equal(loaded, full)


def test_any_box_is_read_from_its_chunks(tmp_path: Path, ranks4: Ranks) -> None:
    """Chunks of a grid, of rows and of columns, some empty."""
    folder, draws = step_folder(tmp_path, 10), random.Random(1)
    ranks4.run(save_distributed, folder, (2, 2))
    entries = read_catalog(folder).tensors
    with ExitStack() as stack:

        def boxes(chunk: Chunk) -> Any:
            file = stack.enter_context(safe_open(folder / chunk.file, "pt"))
            return file.get_slice(chunk.key)

        for name, tensor in values(1).items():
            for _ in range(5 if tensor.numel() else 0):
                starts = [draws.randrange(size) for size in tensor.shape]
                ends = zip(starts, tensor.shape, strict=True)
                box = tuple(slice(start, draws.randint(start + 1, end)) for start, end in ends)
                assert torch.equal(read_box(entries[name], box, boxes), tensor[box]), (name, box)


def test_tied_and_sliced_tensors_load_as_saved(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {"base": base, "tied": base, "slice": base[1:3, 2:4]}
    checkpoint.save(step_folder(tmp_path, 1), tensors, {})
    loaded = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    checkpoint.load(step_folder(tmp_path, 1), loaded)
    assert different(loaded, tensors) == []


def test_some_of_the_tensors_may_be_loaded(tmp_path: Path) -> None:
    checkpoint.save(step_folder(tmp_path, 1), values(1), STATE)
    subset = {"grid": torch.zeros(5, 6, dtype=torch.float64)}
    assert checkpoint.load(step_folder(tmp_path, 1), subset, partial=True) == STATE
    assert torch.equal(subset["grid"], values(1)["grid"])
    with pytest.raises(UserError, match=r"not in the checkpoint \(1\): other"):
        checkpoint.load(step_folder(tmp_path, 1), {"other": torch.zeros(1)}, partial=True)


def test_mismatches_are_named_and_change_no_tensor(tmp_path: Path) -> None:
    checkpoint.save(step_folder(tmp_path, 1), values(1), {})
    tensors = values(2)
    del tensors["columns"]
    tensors |= {f"extra{i}": torch.zeros(1) for i in range(6)}
    tensors["uneven"] = torch.zeros(7, 4)
    tensors["grid"] = tensors["grid"].float()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load(step_folder(tmp_path, 1), tensors)
    for phrase in (
        "not in the checkpoint (6): extra0, extra1, extra2, extra3, and 2 more",
        "only in the checkpoint (1): columns",
        "of another shape (1): uneven (saved [7, 3], model [7, 4])",
        "of another dtype (1): grid (saved torch.float64, model torch.float32)",
        "The recipe is not the one",
    ):
        assert phrase in str(caught.value)
    assert different(tensors, before) == []


def test_values_that_are_not_tensors_or_not_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="step is a int"):
        checkpoint.save(step_folder(tmp_path, 1), {"step": 1}, {})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(step_folder(tmp_path, 1), {}, {"loss": math.nan})
    assert newest(tmp_path) is None


def test_newest_and_prune(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None
    for step in (9, 10, 100, 20):
        checkpoint.save(step_folder(tmp_path, step), {"w": torch.zeros(1)}, {"step": step})
    (tmp_path / "step-00000200.partial").mkdir()
    step_folder(tmp_path, 300).mkdir()
    (tmp_path / "step-00000001.pruned").mkdir()
    assert newest(tmp_path) == step_folder(tmp_path, 100)
    interrupted = mock.patch("shutil.rmtree", side_effect=[None, OSError("interrupted")])
    with interrupted, pytest.raises(OSError, match="interrupted"):
        prune(tmp_path, 3)
    assert [read_state(path)["step"] for path in checkpoint.folders.checkpoints(tmp_path)] == [
        10,
        20,
        100,
    ]
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("step-*[0-9d]")) == [
        "step-00000020",
        "step-00000100",
        "step-00000300",
    ]
    with pytest.raises(ValueError, match="keep = 0"):
        prune(tmp_path, 0)
