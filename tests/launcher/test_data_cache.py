"""The cache of tokens: its splits, and when its entries are made, used and made again."""

import os
import re
import subprocess
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_sources import recipe, write_lines

from colonnade.launcher.data import Data, open_data, prepare_data, read_indexed, source_fingerprint
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("temporary_caches")

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def entries() -> list[Path]:
    """Lists the folders of the cache that hold tokens."""
    return [path.parent for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("source.json")]


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
