"""The cache of tokens: its splits, and when its entries are made, used and made again."""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_sources import recipe, write_lines

from colonnade.launcher.data import Data, open_data, prepare_data, read_indexed, source_fingerprint
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("temporary_caches")

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def entries() -> list[Path]:
    """Lists the folders of the cache that hold tokens."""
    return [path.parent for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("source.json")]


def write_prompted(folder: Path) -> SourceConfig:
    """Writes 60 documents with prompts, so that their tokens have a loss mask."""
    lines = [f'{{"text": "text {i}", "prompt": "ask {i % 7}"}}\n' for i in range(60)]
    (folder / "a.jsonl").write_text("".join(lines))
    return SourceConfig(format="jsonl", path=str(folder / "a.jsonl"), prompt="prompt")


def read_all(data: Data) -> list[torch.Tensor]:
    """Reads all rows to train and to validate on."""
    parts = [part for part in (data.train, data.validation) if part is not None]
    return [field for part in parts for field in part.batch(range(part.rows or 0))]


def lengths(data: Data) -> tuple[int | None, int | None]:
    return data.train.rows, data.validation.rows if data.validation else None


def test_the_standard_library_is_split_by_file() -> None:
    data = open_data(recipe(SourceConfig(), seq_len=512))
    assert data.validation is not None
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    texts = [
        path.read_bytes().decode(errors="replace").encode()
        for path in STDLIB.rglob("*.py")
        if path.is_file() and not skipped & set(path.relative_to(STDLIB).parts)
    ]
    texts = [text for text in texts if text]
    splits: list[list[bytes]] = []
    [entry] = entries()
    for split in ("train", "validation"):
        tokens = read_indexed(entry / split)
        content = tokens.tokens[:].astype(np.uint8).tobytes()
        bounds = [*tokens.starts.tolist(), len(content)]
        splits.append([content[a : b - 1] for a, b in pairwise(bounds)])
    assert sorted(splits[0] + splits[1]) == sorted(texts)
    assert 0.02 < len(splits[1]) / len(texts) < 0.09


def test_validation_takes_its_share_of_the_documents(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 2000)
    train, validation = lengths(open_data(recipe(source, validation=0.2)))
    assert train is not None
    assert validation is not None
    assert abs(validation / (train + validation) - 0.2) < 0.03
    # The split does not depend on the seed, and a single document is not held out.
    other = recipe(source, validation=0.2)
    other = other.model_copy(update={"train": TrainConfig(seq_len=8, seed=5)})
    assert lengths(open_data(other)) == (train, validation)
    assert lengths(open_data(recipe(source, validation=0.0)))[1] is None
    single = write_lines(tmp_path / "b.jsonl", 1)
    assert lengths(open_data(recipe(single, validation=0.99))) == (1, None)


def test_a_mixture_validates_on_all_its_sources(tmp_path: Path) -> None:
    sources = [write_lines(tmp_path / f"{i}.jsonl", 100 + i) for i in range(2)]
    stream = sources[0].model_copy(update={"stream": True})
    separate = [lengths(open_data(recipe(s, validation=0.2))) for s in sources]
    mixed = open_data(recipe(*sources, stream, validation=0.2))
    assert mixed.train.rows is None
    assert mixed.validation is not None
    assert mixed.validation.rows == sum(v or 0 for _, v in separate)
    assert len(mixed.train.describe().splitlines()) == 3
    assert mixed.train.batch(range(30)).tokens.shape == (30, 8)
    assert open_data(recipe(stream, validation=0.2)).validation is None


def test_the_cache_is_used_until_the_text_or_an_option_changes(tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    source = write_lines(tmp_path / "a.jsonl", 50)

    def count(**options: Any) -> int:
        prepare_data(recipe(source, **{"cache": str(cache), **options}))
        return len(list(cache.glob("*/source.json")))

    assert count() == 1
    [entry] = (path.parent for path in cache.glob("*/source.json"))
    before = entry.stat().st_mtime_ns
    assert count() == 1
    assert count(seq_len=4) == 1
    assert entry.stat().st_mtime_ns == before
    assert count(validation=0.3) == 2
    write_lines(tmp_path / "a.jsonl", 51)
    assert count() == 3
    source = source.model_copy(update={"weight": 3.0})
    assert count() == 3
    assert not list(cache.rglob("*.tmp"))


def test_one_of_several_processes_tokenises_and_the_others_wait(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 50)
    program = f"""
import sys, time
from pathlib import Path
from colonnade.launcher.data import cache, opening
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig
write_split = cache._write_split
def wait_and_write(*arguments):
    while len(list(Path({str(tmp_path)!r}).glob("ready-*"))) < 3:  # until all processes ask
        time.sleep(0.01)
    return write_split(*arguments)
cache._write_split = wait_and_write
Path({str(tmp_path)!r}, f"ready-{{sys.argv[1]}}").touch()
recipe = Recipe(data=DataConfig(sources=(SourceConfig(path={source.path!r}),)),
                train=TrainConfig(seq_len=8))
print(opening.open_data(recipe).train.batch([0]).tokens.tolist())
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in outputs}) == 1
    assert outputs[0][0].startswith("[[")
    printed = "".join(err for _, err in outputs)
    assert printed.count("50 documents") == 1
    assert printed.count("tokenising") == 1
    [entry] = entries()
    assert {path.name for path in entry.iterdir()} == {
        "source.json",
        *(f"{split}{end}" for split in ("train", "validation") for end in (".bin", ".idx")),
        *(f"{split}.record.json" for split in ("train", "validation")),
    }


def test_moved_files_are_not_tokenised_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", 50)
    rows = open_data(recipe(source)).train
    assert "tokenising" in capsys.readouterr().err
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved" / "b.jsonl")
    moved = SourceConfig(format="jsonl", path=str(tmp_path / "moved" / "b.jsonl"))
    moved_rows = open_data(recipe(moved)).train
    assert "tokenising" not in capsys.readouterr().err
    moved_rows.load_state(rows.state())
    assert source_fingerprint(moved) == source_fingerprint(write_lines(tmp_path / "a.jsonl", 50))
    # Other text with the same number of documents and rows is detected.
    text = (tmp_path / "a.jsonl").read_text().replace("document", "dokument")
    (tmp_path / "a.jsonl").write_text(text)
    assert source_fingerprint(moved) != source_fingerprint(source)
    other = open_data(recipe(source)).train
    assert "tokenising" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds other tokens than when the run was saved"):
        other.load_state(rows.state())
    other.load_state({"rows": rows.rows})  # a state from before `content` existed


def damage_missing(file: Path) -> None:
    file.unlink()


def damage_truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def damage_emptied(file: Path) -> None:
    os.truncate(file, 0)


def damage_changed(file: Path) -> None:
    """Changes one byte, and keeps the length and the time of modification."""
    content, stat = bytearray(file.read_bytes()), file.stat()
    # In an index: the second of the document bounds; in JSON: within the first string.
    at = -8 * 3 if file.suffix == ".idx" else len(content) // 3
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


ENTRY_FILES = (
    *(f"{split}{end}" for split in ("train", "validation") for end in (".bin", ".idx", ".mask")),
    *("train.record.json", "validation.record.json", "source.json"),
)


@pytest.mark.parametrize("name", ENTRY_FILES)
@pytest.mark.parametrize(
    "damage", [damage_missing, damage_truncated, damage_emptied, damage_changed]
)
def test_a_damaged_cache_is_made_again(
    damage: Callable[[Path], None],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_prompted(tmp_path)
    data = open_data(recipe(source, validation=0.3))
    capsys.readouterr()
    state, rows = data.train.state(), read_all(data)
    [entry] = entries()
    original = {path.name: path.read_bytes() for path in entry.iterdir()}
    damage(entry / name)
    prepare_data(recipe(source, validation=0.3))
    [first, *others] = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"the cache of jsonl '{source.path}' is damaged and is made again: {entry}/"
    ) or first.endswith(f"cannot read {entry / name}: No such file or directory")
    assert [line.split()[0] for line in others] == ["tokenising", "60"]
    again = open_data(recipe(source, validation=0.3))
    assert capsys.readouterr().err == ""
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == original
    again.train.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(read_all(again), rows, strict=True))
    # The damaged folder is kept for those that read it, for a month.
    [damaged] = entry.parent.glob("*.damaged")
    assert damaged.is_dir()
    os.utime(damaged, (0, 0))
    damage_missing(entry / "train.bin")
    prepare_data(recipe(source, validation=0.3))
    assert len(list(entry.parent.glob("*.damaged"))) == 1
    assert not damaged.exists()


def test_a_damaged_pointer_is_written_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 50)
    rows = open_data(recipe(source)).train
    [entry] = entries()
    [pointer] = (p for p in (entry.parent / "known").iterdir() if p.suffix != ".lock")
    for content in (b"", b"\0", b"\xff", b"..", b"0" * 32):
        pointer.write_bytes(content)
        assert open_data(recipe(source)).train.state() == rows.state()
        assert pointer.read_text() == entry.name
    assert entries() == [entry]


def test_text_changed_at_equal_length_and_time_is_tokenised_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", 50)
    rows = open_data(recipe(source)).train
    stat = (tmp_path / "a.jsonl").stat()
    text = (tmp_path / "a.jsonl").read_text().replace("document 7", "document 8")
    (tmp_path / "a.jsonl").write_text(text)
    os.utime(tmp_path / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"a\.jsonl' holds other tokens than when"):
        open_data(recipe(source)).train.load_state(rows.state())


def test_one_of_several_processes_makes_a_damaged_cache_again(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:  # the same content at two paths, so that locks of pointers do not suffice
        source = write_lines(path, 50)
        rows = open_data(recipe(source)).train.batch(range(40))
    [entry] = entries()
    program = f"""
import sys, time
from pathlib import Path
from colonnade.launcher.data import open_data
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig
recipe = Recipe(data=DataConfig(sources=(SourceConfig(format="jsonl", path=sys.argv[1]),)),
                train=TrainConfig(seq_len=8))
Path(f"{{sys.argv[2]}}-ready").touch()
while len(list(Path({str(tmp_path)!r}).glob("*-ready"))) < 4:
    time.sleep(0.001)
print(open_data(recipe).train.batch(range(40)).tokens.tolist())
"""
    damage_changed(entry / "train.bin")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(paths[number % 2]), str(tmp_path / str(number))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert {out.strip() for out, _ in outputs} == {str(rows.tokens.tolist())}
    printed = "".join(err for _, err in outputs)
    assert printed.count("is damaged and is made again: ") == 1
    assert printed.count("50 documents") == 1
    assert entry in entries()
    assert len(list(entry.parent.glob("*.damaged"))) == 1


def test_progress_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from colonnade.launcher.data import cache

    monkeypatch.setattr(cache, "_PROGRESS_INTERVAL", 0.0)
    open_data(recipe(write_lines(tmp_path / "a.jsonl", 600)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert [re.findall(r"([\d,]+) documents|, (\d+%)", line)[0][0] for line in lines] == [
        "256", "512", "600"
    ]  # fmt: skip
    assert lines[-1].endswith("100%")
