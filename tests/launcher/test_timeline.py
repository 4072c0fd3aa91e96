"""A picture of a pipeline's step: boxes where their intervals are, idle shares, a real step."""

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.data import IndexedWriter
from colonnade.launcher.data.indexed import token_dtype
from colonnade.launcher.recipe.load import load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train import picture
from colonnade.launcher.train.loop import run_job
from colonnade.launcher.train.timeline import PASSES, Timeline
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.pipeline.bubble import PassTimes, idle_share, shortest_step
from colonnade.parallel.pipeline.schedule import actions_of
from colonnade.parallel.pipeline.timeline import Interval
from colonnade.parallel.world import World

# Two ranks, two micro-batches, 1F1B: forward and backward take 1 s each, and a transfer 0.5 s.
# 0: F0 F1 wait       B0 wait    B1
# 1:    wait F0 B0       F1 B1
HAND_MADE = (
    (
        Interval("forward", 0, 0, 100.0, 101.0),
        Interval("send forward", 0, 0, 101.0, 101.1),
        Interval("forward", 0, 1, 101.1, 102.1),
        Interval("send forward", 0, 1, 102.1, 102.2),
        Interval("wait backward", 0, 0, 102.2, 104.0),
        Interval("backward", 0, 0, 104.0, 105.0),
        Interval("wait backward", 0, 1, 105.0, 106.5),
        Interval("backward", 0, 1, 106.5, 107.5),
    ),
    (
        Interval("wait forward", 1, 0, 100.0, 101.5),
        Interval("forward", 1, 0, 101.5, 102.5),
        Interval("backward", 1, 0, 102.5, 103.5),
        Interval("send backward", 1, 0, 103.5, 103.6),
        Interval("forward", 1, 1, 104.0, 105.0),
        Interval("backward", 1, 1, 105.0, 106.0),
        Interval("send backward", 1, 1, 106.0, 106.1),
    ),
)


def hand_made() -> Timeline:
    return Timeline(3, ParallelConfig(pp=2), HAND_MADE)


def rectangles(svg: str) -> list[tuple[str, dict[str, str]]]:
    """Returns title and attributes of the boxes that have a title."""
    found = []
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"):
        title = element.find("{http://www.w3.org/2000/svg}title")
        if title is not None:
            found.append((title.text or "", dict(element.attrib)))
    return found


def test_the_idle_share_is_what_no_pass_fills() -> None:
    timeline = hand_made()
    assert timeline.window == (100.0, 107.5)
    assert timeline.micro_batches == 2
    assert timeline.idle == pytest.approx(1 - 8 / (2 * 7.5))
    assert timeline.pass_times == pytest.approx(PassTimes(1.0, 1.0, 0.0))
    assert timeline.formula == pytest.approx(2 / 6)  # (p - 1) (F + B) of m + p - 1 times that
    assert timeline.by_order == pytest.approx(2 / 6)
    record = timeline.record()
    assert record["idle"] == timeline.idle
    assert record["ranks"][1][1] == {
        "kind": "forward", "stage": 1, "micro_batch": 0, "start": 1.5, "end": 2.5
    }  # fmt: skip


def test_every_box_is_where_its_interval_is(tmp_path: Path) -> None:
    timeline = hand_made()
    timeline.write(tmp_path)
    svg = (tmp_path / "timeline.svg").read_text()
    boxes = rectangles(svg)
    assert len(boxes) == sum(len(rank) for rank in HAND_MADE)
    scale = picture.WIDTH / 7.5
    for rank, intervals in enumerate(HAND_MADE):
        for kind, stage, number, start, end in intervals:
            head = f"{kind}, stage {stage}, micro-batch {number}: "
            (attributes,) = [a for title, a in boxes if title.startswith(head)]
            if kind.startswith("wait"):  # communication from when the other rank sends
                start = {"wait forward": 101.0, "wait backward": 103.5 + 2.5 * number}[kind]
            assert float(attributes["x"]) == pytest.approx(
                picture.LEFT + (start - 100) * scale, abs=0.01
            )
            assert float(attributes["width"]) == pytest.approx((end - start) * scale, abs=0.01)
            assert float(attributes["y"]) == picture.TOP + rank * (picture.ROW + picture.GAP)
            colour = kind if kind in PASSES else "communication"
            assert attributes["fill"] == picture.COLOURS[colour][0]
    first = "step 3: 1f1b, 2 ranks, 2 stages, 2 micro-batches"
    assert first in svg
    assert "idle 46.7% measured; 33.3% by the schedule's formula" in svg
    assert json.loads((tmp_path / "timeline.json").read_text())["stages"] == 2


def test_a_box_has_the_words_that_fit() -> None:
    wide, narrow = (
        picture.draw_box(picture.Box("forward", "forward", 1, 12, 0.0, width), 0, 1.0)
        for width in (20.0, 16.0)
    )
    assert [re.sub("<[^>]*>", "", t) for t in wide[1:]] == ["12", "s1"]
    assert [re.sub("<[^>]*>", "", t) for t in narrow[1:]] == ["s1"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "bfs", "zb1p"])
@pytest.mark.parametrize("micro_batches", [4, 8, 16])
def test_the_order_of_actions_gives_the_formula(schedule: str, micro_batches: int) -> None:
    times = PassTimes(3.0, 5.0, 2.0) if schedule != "zb1p" else PassTimes(2.0, 2.0, 2.0)
    parallel = ParallelConfig.model_validate({"pp": 4, "schedule": schedule})
    step = shortest_step(actions_of(parallel, micro_batches), parallel, times)
    by_order = 1 - micro_batches * times.total / step
    assert by_order == pytest.approx(idle_share(parallel, times, micro_batches))


def test_v_shaped_schedules_idle_at_the_ends_alone() -> None:
    """Every rank of ZB-V is busy from its first pass to its last, but ranks start one by one."""
    times = PassTimes(2.0, 2.0, 2.0)
    for schedule in ("zbv", "dualpipev"):
        parallel = ParallelConfig.model_validate({"pp": 4, "schedule": schedule})
        step = shortest_step(actions_of(parallel, 8), parallel, times)
        assert step == 8 * times.total + 3 * times.forward / 2


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A tiny recipe of two stages of a rank, whose second step is recorded."""
    prefix = tmp_path / "tokens"
    generator = torch.Generator().manual_seed(3)
    with IndexedWriter(prefix, token_dtype(50)) as writer:
        for _ in range(100):
            writer.add(torch.randint(0, 50, (30,), generator=generator).numpy())
    path = tmp_path / "tiny.toml"
    path.write_text(f"""
[model]
pattern = "*-*-"
hidden = 16
heads = 2
ffn = 24
vocab = 50
[[data.sources]]
format = "tokens"
path = "{prefix}"
[train]
steps = 3
global_batch = 8
micro_batch = 2
seq_len = 16
timeline = 2
""")
    return load_recipe(path, ["parallel.pp=2", "parallel.schedule=zbv"], 2)


def run(rank: int, size: int, recipe: Recipe, folder: Path) -> int:
    """Runs a job on one rank."""
    return run_job(recipe, folder, World(rank, size, torch.device("cpu")))


def test_a_step_records_the_actions_of_its_schedule_in_order(
    ranks2: Ranks, recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    ranks2.run(run, recipe, folder)
    record = json.loads((folder / "timeline.json").read_text())
    assert (record["step"], record["schedule"], record["stages"]) == (2, "zbv", 4)
    for rank, actions in actions_of(recipe.parallel, 4).items():
        intervals = record["ranks"][rank]
        named = [(i["kind"], i["stage"], i["micro_batch"]) for i in intervals]
        performed = [name for name in named if not name[0].startswith("wait")]
        assert performed == [tuple(action) for action in actions]
        received = {(kind.split()[1], *rest) for kind, *rest in actions if kind[:4] == "recv"}
        waits = [(kind.split()[1], *rest) for kind, *rest in named if kind[:4] == "wait"]
        assert len(waits) == len(received)
        assert set(waits) == received
        for before, after in pairwise(intervals):
            assert before["start"] <= before["end"] <= after["start"]
    assert 0 < record["idle"] < 1
    assert record["idle_by_formula"] == 0
    svg = (folder / "timeline.svg").read_text()
    assert len(rectangles(svg)) == sum(len(rank) for rank in record["ranks"])
    assert f"idle {record['idle']:.1%} measured; 0.0% by the schedule" in svg
