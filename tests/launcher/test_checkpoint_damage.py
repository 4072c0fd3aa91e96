"""Checkpoints whose files have changed: found, named, and passed over where that is asked for."""

import bisect
import errno
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import Ranks
from test_checkpoint import (
    STATE,
    check_in_one_process,
    different,
    distribute,
    save_distributed,
    values,
)

from colonnade.launcher import checkpoint
from colonnade.launcher.checkpoint import manifest, newest, read_state, step_folder
from colonnade.launcher.errors import UserError


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, bit: int = 1234) -> None:
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def change_step(path: Path) -> None:
    """A change that leaves valid JSON of the same length."""
    path.write_text(path.read_text().replace('"step": 10', '"step": 90'))


@pytest.mark.parametrize("steps", [(10,), (5, 10)])
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rank-00000.safetensors", truncate),
        ("rank-00000.safetensors", lambda path: path.write_bytes(bytes(100))),
        ("rank-00000.safetensors", Path.unlink),
        ("tensors.json", truncate),
        ("tensors.json", lambda path: path.write_text("{}")),
        ("tensors.json", flip),
        ("tensors.json", Path.unlink),
        ("state.json", truncate),
        ("state.json", change_step),
        ("state.json", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", truncate),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace(" ", "  "))),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, steps: tuple[int, ...], file: str, damage: Callable[[Path], None]
) -> None:
    for step in (*steps, 20):
        checkpoint.save(step_folder(tmp_path, step), values(1), STATE)
    path, tensors = step_folder(tmp_path, 10) / file, values(2)
    damage(path)
    with pytest.raises(UserError) as caught:
        checkpoint.load(step_folder(tmp_path, 10), tensors)
    assert different(tensors, values(2)) == []
    assert str(caught.value).startswith(f"{path} is damaged (")
    remedy = str(step_folder(tmp_path, 5)) if 5 in steps else "there is no earlier checkpoint"
    assert remedy in str(caught.value)


def load_error(rank: int, size: int, folder: Path) -> str:
    """Loads the checkpoint onto four ranks; returns the error."""
    try:
        checkpoint.load(folder, distribute(values(2), (2, 2)))
    except UserError as error:
        return str(error)
    return ""


def test_damage_is_reported_on_every_rank(tmp_path: Path, ranks4: Ranks) -> None:
    folder = step_folder(tmp_path, 10)
    ranks4.run(save_distributed, folder, (2, 2))
    truncate(folder / "rank-00003.safetensors")  # read by some of the ranks only
    messages = ranks4.run(load_error, folder)
    assert len(set(messages)) == 1
    assert "rank-00003.safetensors is damaged" in messages[0]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """At 100 random places of the files, more often in larger ones, as damage would be."""
    folder = step_folder(tmp_path, 10)
    checkpoint.save(folder, values(1), STATE)
    files = sorted(folder.iterdir())
    assert len(files) == 4
    sizes = [path.stat().st_size for path in files]
    places = random.Random(0).sample(range(8 * sum(sizes)), 100)
    for place in [*places, 0, 8 * sum(sizes) - 1]:
        ends = list(itertools.accumulate(8 * size for size in sizes))
        number = bisect.bisect_right(ends, place)
        path, bit = files[number], place - ends[number] + 8 * sizes[number]
        flip(path, bit)
        with pytest.raises(UserError) as caught:
            checkpoint.load(folder, values(2))
        assert str(caught.value).startswith(f"{path} is damaged (")
        flip(path, bit)
    check_in_one_process(folder)


def test_a_file_of_another_checkpoint_is_found(tmp_path: Path) -> None:
    """It has the same name, size and tensors."""
    for step in (10, 20):
        checkpoint.save(step_folder(tmp_path, step), values(step), STATE)
    name = "rank-00000.safetensors"
    shutil.copy(step_folder(tmp_path, 10) / name, step_folder(tmp_path, 20) / name)
    with pytest.raises(UserError, match=rf"{name} is damaged \(its checksum differs"):
        checkpoint.load(step_folder(tmp_path, 20), values(2))


def test_blocks_are_shared_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is checked once by one of the ranks, and damage is named with its place."""
    monkeypatch.setattr(manifest, "BLOCK", 1 << 10)
    folder = step_folder(tmp_path, 10)
    checkpoint.save(folder, {"w": torch.randn(4000)}, STATE)
    record = manifest.read_manifest(folder).files["rank-00000.safetensors"]
    assert len(record.crc32) == -(-record.size // 1024) > 15
    assert [b.size for b in manifest.blocks(manifest.read_manifest(folder))][:15] == [1024] * 15
    flip(folder / "rank-00000.safetensors", 8 * 5000)
    with pytest.raises(UserError, match=r"differs, between bytes 4,096 and 5,120"):
        checkpoint.load(folder, {"w": torch.zeros(4000)})


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """`choose` passes over damaged ones where it may, and says so."""
    assert checkpoint.choose(tmp_path, True) == (None, {})
    for step in (10, 20, 30):
        checkpoint.save(step_folder(tmp_path, step), values(step), STATE)
    flip(step_folder(tmp_path, 30) / "state.json")
    (step_folder(tmp_path, 20) / "rank-00000.safetensors").unlink()
    assert checkpoint.choose(tmp_path, False) == (step_folder(tmp_path, 30), {})
    folder, passed = checkpoint.choose(tmp_path, True)
    assert folder == step_folder(tmp_path, 10)
    assert list(passed) == [step_folder(tmp_path, 30), step_folder(tmp_path, 20)]
    assert "state.json is damaged (its checksum differs" in passed[step_folder(tmp_path, 30)]
    flip(step_folder(tmp_path, 10) / "tensors.json")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoint.choose(tmp_path, True)


def test_what_is_not_damaged_is_not_passed_over(tmp_path: Path) -> None:
    """A newer version's checkpoint, or one without permission, may be whole."""
    for step in (10, 20):
        checkpoint.save(step_folder(tmp_path, step), values(step), STATE)
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path.name == "tensors.json" and "20" in path.parent.name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, **options)

    with (
        mock.patch.object(Path, "stat", refuse),
        pytest.raises(UserError, match=r"tensors\.json cannot be read"),
    ):
        checkpoint.choose(tmp_path, True)
    with mock.patch.object(manifest.Manifest, "model_dump", return_value={"format": 4}):
        manifest.write_manifest(step_folder(tmp_path, 20), {}, LISTED)
    with pytest.raises(UserError, match="has format 4"):
        checkpoint.choose(tmp_path, True)


RECORD = manifest.FileRecord(size=0, crc32=())
LISTED = {"tensors.json": RECORD, "state.json": RECORD}


@pytest.mark.parametrize(
    "files",
    [
        {"tensors.json": RECORD},
        {**LISTED, "../../other.json": RECORD},
        {**LISTED, "rank-00000.safetensors": RECORD.model_construct(size=5, crc32=())},
    ],
)
def test_a_manifest_that_leaves_something_out_is_refused(
    tmp_path: Path, files: dict[str, manifest.FileRecord]
) -> None:
    """Its own checksum is right."""
    folder = step_folder(tmp_path, 10)
    checkpoint.save(folder, values(1), STATE)
    unchecked = manifest.Manifest.model_construct(format=3, about={}, files=files)
    (folder / "manifest.json").write_text(unchecked.text())
    with pytest.raises(UserError, match=r"manifest.json is damaged \(files"):
        checkpoint.load(folder, values(2))


def test_a_file_of_the_catalog_that_the_manifest_leaves_out(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 10)
    checkpoint.save(folder, values(1), STATE)
    listed = dict(manifest.read_manifest(folder).files)
    del listed["rank-00000.safetensors"]
    manifest.write_manifest(folder, {}, listed)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors has no checksums"):
        checkpoint.load(folder, values(2))


def test_listing_while_checkpoints_are_deleted(tmp_path: Path) -> None:
    """A run prunes in its thread; `generate` and others look for its newest checkpoint."""
    gone, iterdir = step_folder(tmp_path, 10), Path.iterdir
    for step in (10, 20):
        checkpoint.save(step_folder(tmp_path, step), values(1), STATE)

    def vanish(path: Path) -> object:
        if path == gone:
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        return iterdir(path)

    with mock.patch.object(Path, "iterdir", vanish):
        assert newest(tmp_path) == step_folder(tmp_path, 20)


def test_a_checkpoint_that_is_set_aside(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(step_folder(tmp_path, step), values(1), STATE)
    assert checkpoint.set_aside(step_folder(tmp_path, 20)).name == "step-00000020.aside"
    assert newest(tmp_path) == step_folder(tmp_path, 10)
    checkpoint.save(step_folder(tmp_path, 20), values(1), STATE)
    shutil.copytree(step_folder(tmp_path, 20), tmp_path / "step-00000020.replaced")
    assert checkpoint.set_aside(step_folder(tmp_path, 20)).name == "step-00000020.aside1"
    assert newest(tmp_path) == step_folder(tmp_path, 10)


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint.save(step_folder(tmp_path, 1), values(1), {})
    (tmp_path / "step-00000002").mkdir()
    for step, problem in ((2, "is empty"), (3, "does not exist")):
        with pytest.raises(UserError, match=f"{problem}.*step-00000001"):
            read_state(step_folder(tmp_path, step))


@pytest.mark.parametrize("found", [1, 2, 4])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, found: int) -> None:
    """The message reports no damage and no earlier checkpoint; a version to come is named."""
    folder = step_folder(tmp_path, 10)
    checkpoint.save(folder, values(1), STATE)
    if found < 3:  # they had no manifest, and the version in the catalog
        (folder / "manifest.json").unlink()
        path = folder / "tensors.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": found}))
    else:
        with mock.patch.object(manifest.Manifest, "model_dump", return_value={"format": found}):
            manifest.write_manifest(folder, {}, LISTED)
    remedy = "update colonnade" if found > 3 else "read it with the version that wrote it"
    with pytest.raises(UserError, match=f"has format {found}, and this .* format 3: {remedy}"):
        checkpoint.load(folder, values(2))
