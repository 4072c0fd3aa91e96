"""Training stages: steps, samples and rates, whole runs of them, and what may change later."""

import weakref
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_job import job, losses

from colonnade.launcher.data import Batch, open_data, prepare_data
from colonnade.launcher.errors import Fault, RecipeError, UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.stages import recipe_at, recipe_of_stage, training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.validate import findings
from colonnade.launcher.train import job as module_of_jobs
from colonnade.launcher.train.events import read_events
from colonnade.launcher.train.job import build, change_stage
from colonnade.launcher.train.metrics import read_metrics
from colonnade.launcher.train.resumable import check_resumable
from colonnade.launcher.train.saves import save
from colonnade.launcher.train.schedule import (
    learning_rate,
    micro_batches,
    reading_plan,
    stage_learning_rate,
)
from colonnade.launcher.verify.plan import plan_job
from colonnade.launcher.verify.shrink import shrink
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import declared
from colonnade.parallel.materialise import new_decoder
from colonnade.parallel.world import World

Make = Callable[..., Recipe]
LONGER = (
    "stage.1.train.seq_len=24",
    "stage.1.train.global_batch=4",
    "stage.1.model.rope_scaling=yarn",
    "stage.1.model.rope_factor=4",
    "stage.1.model.rope_original=16",
)
FROZEN = ("stage.2.train.freeze=['embedding.*','blocks.[02].*']", "stage.2.optimizer.lr=0.003")
FREED = ("stage.3.train.freeze=['blocks.1.*']", "stage.3.train.seq_len=16")


def steps(*counts: int) -> list[str]:
    """Overrides with the lengths of stages."""
    return [f"stage.{index}.steps={count}" for index, count in enumerate(counts)]


def staged(recipe: Make, *overrides: str) -> Recipe:
    """Four stages: as the recipe, longer rows, some weights frozen, others frozen."""
    return recipe(*steps(3, 3, 3, 3), *LONGER, *FROZEN, *FREED, *overrides)


def test_what_a_stage_leaves_out_goes_on(recipe: Make) -> None:
    first, second, third, fourth = training_stages(staged(recipe, "train.micro_batch=4"))
    assert [(s.first, s.stop) for s in (first, second, third, fourth)] == [
        (0, 3), (3, 6), (6, 9), (9, 12),
    ]  # fmt: skip
    assert (first.recipe.train.seq_len, first.recipe.model.rope_scaling) == (16, "none")
    assert third.recipe.train.seq_len == second.recipe.train.seq_len == 24
    assert third.recipe.train.global_batch == 4
    assert third.recipe.model.rope_factor == 4
    assert fourth.recipe.train.freeze == ("blocks.1.*",)
    assert [s.order for s in (first, second, third, fourth)] == [0, 1, 1, 2]
    assert [s.samples for s in (first, second, third, fourth)] == [0, 0, 12, 0]
    # the schedule of the first two, and one of its own for the last two
    schedules = [(s.schedule_first, s.schedule_steps) for s in (first, second, third, fourth)]
    assert schedules == [(0, 6), (0, 6), (6, 6), (6, 6)]
    rates = [stage_learning_rate(second, step) for step in range(3, 6)]
    assert rates == [learning_rate(second.recipe.optimizer, step, 6) for step in range(3, 6)]
    assert stage_learning_rate(fourth, 9) == learning_rate(fourth.recipe.optimizer, 3, 6)


def test_weight_decay_begins_no_schedule(recipe: Make) -> None:
    settings = recipe(*steps(3, 5), "stage.1.optimizer.weight_decay=0.2")
    second = training_stages(settings)[1]
    assert second.recipe.optimizer.weight_decay == 0.2
    assert (second.schedule_first, second.schedule_steps) == (0, 8)


def test_stages_that_go_on_read_every_sample_once(recipe: Make) -> None:
    stages = training_stages(recipe(*steps(3, 2, 4), "stage.1.train.global_batch=4"))
    assert {stage.order for stage in stages} == {0}
    read = [
        sample
        for stage in stages
        for rank in range(2)
        for batch in reading_plan(stage, stage.first, rank, 2)
        for sample in batch
    ]
    assert sorted(read) == list(range(3 * 8 + 2 * 4 + 4 * 4))


def test_a_length_in_tokens_is_rounded_up_to_steps(recipe: Make) -> None:
    (stage,) = training_stages(recipe(f"stage.0.tokens={8 * 16 * 5 + 1}"))
    assert stage.steps == 6


def test_a_recipe_with_stages_is_written_and_read_again(recipe: Make, tmp_path: Path) -> None:
    settings = staged(recipe)
    path = tmp_path / "again.toml"
    path.write_text(dump_recipe(settings))
    again = load_recipe(path)
    assert training_stages(again) == training_stages(settings)
    assert "steps = 8" not in dump_recipe(settings)  # [train] has none


# Runs


def training_losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def test_stages_that_change_nothing_are_one_run(
    ranks2: Ranks, recipe: Make, tmp_path: Path
) -> None:
    ranks2.run(job, recipe(), tmp_path / "one")
    ranks2.run(job, recipe(*steps(3, 1, 4)), tmp_path / "three")
    assert training_losses(tmp_path / "three") == training_losses(tmp_path / "one")


def plain_losses(settings: Recipe) -> list[float]:
    """The losses of a recipe with stages by a plain loop, with PyTorch's AdamW, which makes the
    state of a parameter at its first gradient; one that is frozen loses it."""
    found: list[float] = []
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for stage in training_stages(settings):
        r = stage.recipe
        model = new_decoder(r.model, r.train.seed, dtype=torch.float64)
        model.load_state_dict(weights or model.state_dict())
        frozen = {n for n, _, _ in declared(model) if any(fnmatch(n, p) for p in r.train.freeze)}
        trained = {n: (p, spec) for n, p, spec in declared(model) if n not in frozen}
        groups = [
            {"params": [p], "weight_decay": 0.1 if spec.decayed else 0.0}
            for p, spec in trained.values()
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        optimizer.state.update({p: state[n] for n, (p, _) in trained.items() if n in state})
        rows = open_data(r, stage.order).train
        for step in range(stage.first, stage.stop):
            samples = [s for micro in micro_batches(stage, step, 0, 1) for s in micro]
            rate = stage_learning_rate(stage, step)
            found.append(one_step(model, optimizer, rows.batch(samples), rate))
        weights = model.state_dict()
        state = {n: optimizer.state[p] for n, (p, _) in trained.items()}
    return found


def one_step(model: Decoder, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> float:
    """One step by hand; returns its loss."""
    tokens, labels, positions, documents = (t.T.long() for t in batch)
    objective, _ = model(tokens, Context(positions, documents), labels)
    loss = objective / (labels != -100).sum()
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    model.zero_grad()
    return float(loss.detach())


def test_a_run_of_stages_equals_a_plain_loop(ranks1: Ranks, recipe: Make, tmp_path: Path) -> None:
    dense = ("model.pattern=*-M", "model.residual=standard", "train.micro_batch=4")
    settings = staged(recipe, *dense)
    ranks1.run(job, settings, tmp_path / "run")
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert training_losses(tmp_path / "run") == pytest.approx(plain_losses(settings), rel=1e-9)
    assert [row["stage"] for row in rows if "loss" in row] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 9, 12]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (3, 6, 9, 12)]


def test_stops_inside_each_stage_and_between_change_nothing(
    ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, recipe: Make, tmp_path: Path
) -> None:
    """Stages change the layout, too: the second has context parallelism."""
    layouts = ("stage.1.parallel.cp=2", "stage.2.parallel.cp=1", "stage.3.parallel.tp=2")
    shared = ("model.experts=4", "stage.2.train.micro_batch=1")
    settings = staged(recipe, *layouts, *shared)
    ranks4.run(job, settings, tmp_path / "uninterrupted")
    run, ends = tmp_path / "stopped", (0, 2, 3, 5, 7, 9, 11)
    for index, (before, until) in enumerate(pairwise((*ends, None))):
        if index == 2:  # other ranks, and a layout without what the stage had
            one = staged(recipe, *shared)
            ranks1.run(job, one, run, before > 0, until)
        else:
            (ranks2 if index == 4 else ranks4).run(job, settings, run, bool(before), until)
    assert losses(run) == pytest.approx(losses(tmp_path / "uninterrupted"), rel=1e-10)
    events = [e["stage"] for e in read_events(tmp_path / "uninterrupted") if e["event"] == "stage"]
    assert events == [1, 2, 3]


def frees_the_stage_before(rank: int, size: int, recipe: Recipe, run: Path) -> bool:
    """Whether the model and the optimizer of a stage, which was saved, are freed before those of
    the next one are built."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    built = build(recipe, run, World(rank, size, torch.device("cpu")))
    with built.saver:
        save(built, wait=True)
    old = [weakref.ref(built.engine.model), weakref.ref(built.engine.optimizer)]
    alive: list[bool] = []

    def build_next(*arguments: Any, **options: Any) -> None:
        alive.extend(ref() is not None for ref in old)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_jobs, "build_engine", build_next)
        change_stage(built, built.stages[1])
    return alive == [False, False]


def test_the_memory_of_a_stage_is_freed_before_the_next(
    ranks2: Ranks, recipe: Make, tmp_path: Path
) -> None:
    assert all(ranks2.run(frees_the_stage_before, staged(recipe), tmp_path / "run"))


# Faults


@pytest.mark.parametrize(
    ("overrides", "field", "text"),
    [
        (["stage.0.train.seq_len=8"], "stage.0.steps", "a stage needs its length"),
        (["stage.0.steps=4", "stage.0.tokens=900"], "stage.0.steps", "stage.0.tokens = 900 says"),
        (["stage.0.steps=4", "train.steps=4"], "train.steps", "has no effect with [[stage]]"),
        ([*steps(4, 4), "stage.1.train.micro_batch=3"], "stage.1.train.global_batch", "multiple"),
        (
            [*steps(4, 4), "stage.1.optimizer.lr=0.1", "stage.1.optimizer.warmup=5"],
            "stage.1.optimizer.warmup", "set stage.1.optimizer.warmup to at most 4",
        ),
        ([*steps(4, 4), "stage.1.train.freeze=['x']"], "stage.1.train.freeze", "matches no"),
        ([*steps(4, 4), "stage.1.train.freeze=['*']"], "stage.1.train.freeze", "nothing would be"),
        ([*steps(4, 4), "stage.1.train.precision=bf16"], "stage.1.train.precision",
         "did you mean train.precision?"),
        ([*steps(4, 4), "stage.1.seq_len=8"], "stage.1.seq_len",
         "did you mean stage.1.train.seq_len?"),
        ([*steps(4, 4), "stage.1.model.rope_factor=2"], "stage.1.model.rope_factor",
         "has no effect with model.rope_scaling = none"),
        ([*steps(4, 4), "train.timeline=9", "parallel.pp=2"], "train.timeline", "give 1..8"),
        ([*steps(4, 4), "train.timeline=6", "stage.0.parallel.pp=2", "stage.1.parallel.pp=1"],
         "train.timeline", "stage 1, which has that step, is no pipeline"),
        (["stage.1.steps=3"], "stage.0.steps", "a stage needs its length"),
        ([*steps(2**40, 2**40)], "stage.0.steps", "all stages together"),
    ],
)  # fmt: skip
def test_a_fault_of_a_stage_names_its_field(
    recipe: Make, overrides: list[str], field: str, text: str
) -> None:
    with pytest.raises(RecipeError) as found:
        recipe(*overrides)
    (fault,) = found.value.faults
    assert fault.field == field
    assert text in fault.remedy


def test_a_fault_of_the_whole_recipe_is_said_once(recipe: Make) -> None:
    with pytest.raises(RecipeError) as found:
        recipe(*steps(4, 4, 4), "model.heads=3")
    assert [fault.field for fault in found.value.faults] == ["model.heads"]


def test_a_stage_longer_than_its_data_is_refused(recipe: Make) -> None:
    rows = open_data(recipe()).train.rows or 0
    whole = rows // 8
    prepare_data(recipe(f"stage.0.steps={whole}"))
    with pytest.raises(RecipeError) as found:
        prepare_data(recipe(f"stage.0.steps={whole + 1}"))
    (fault,) = found.value.faults
    assert fault.field == "stage.0.steps"
    assert f"set stage.0.steps to at most {whole}" in fault.remedy
    assert "stage.0.epochs = 2" in fault.remedy
    prepare_data(recipe(f"stage.0.steps={whole + 1}", "stage.0.epochs=2"))
    with pytest.raises(RecipeError):  # the second goes on with what the first has left
        prepare_data(recipe(f"stage.0.steps={whole}", "stage.1.steps=1"))


def faults_of_resuming(saved: Recipe, wanted: Recipe, step: int) -> list[Fault]:
    try:
        check_resumable(saved, wanted, step)
    except RecipeError as error:
        return error.faults
    return []


def test_resuming_with_other_data_says_to_add_a_stage(recipe: Make) -> None:
    (fault,) = faults_of_resuming(recipe(), recipe("train.seq_len=24"), 5)
    assert fault.field == "train.seq_len"
    remedy = "stage.0.steps=5 stage.1.steps=N stage.1.train.seq_len=24"
    assert remedy in fault.remedy
    added = recipe(*remedy.replace("=N", "=3").split())
    assert faults_of_resuming(recipe(), added, 5) == []
    (fault,) = faults_of_resuming(added, recipe(*steps(5, 3), "train.seq_len=24"), 6)
    assert "stage.2.steps=N stage.2.train.seq_len=24" in fault.remedy
    found = faults_of_resuming(recipe(), recipe("model.hidden=32"), 5)
    assert "model.hidden" in {fault.field for fault in found}
    assert all(fault.remedy.endswith("or start a new run") for fault in found)


def test_stages_that_have_not_begun_may_change(recipe: Make) -> None:
    saved = staged(recipe)
    assert faults_of_resuming(saved, staged(recipe, "stage.2.train.seq_len=8"), 6) == []
    (fault,) = faults_of_resuming(saved, staged(recipe, "stage.2.train.seq_len=8"), 7)
    assert fault.field == "stage.2.train.seq_len"
    # the stage that is trained may become longer, and one that has ended may not
    assert faults_of_resuming(saved, staged(recipe, "stage.1.steps=9"), 5) == []
    (fault,) = faults_of_resuming(saved, staged(recipe, "stage.1.steps=9"), 6)
    assert fault.field == "stage.1.steps"
    (fault,) = faults_of_resuming(saved, recipe(*steps(3)), 6)
    assert fault.field == "stage.1"
    # nor shorter than what it has trained
    (fault,) = faults_of_resuming(saved, staged(recipe, "stage.1.steps=1"), 5)
    assert (fault.field, "has trained 2 steps" in fault.remedy) == ("stage.1.steps", True)
    (fault,) = faults_of_resuming(recipe(), recipe(*steps(4, 4)), 6)
    assert (fault.field, "has trained 6 steps" in fault.remedy) == ("stage.0.steps", True)


def test_what_no_stage_can_have_is_for_a_new_run(recipe: Make) -> None:
    ramp = ("train.ramp_batch=4", "train.ramp_steps=3")
    (fault,) = faults_of_resuming(recipe(*ramp), recipe(*ramp, "train.seq_len=24"), 5)
    assert fault.remedy.endswith("or start a new run")


def test_validation_of_its_own_is_named(recipe: Make) -> None:
    source = "data.validation_sources.0"
    given = ("data.validation=", f"{source}.format=tokens", f"{source}.path=held")
    (fault,) = faults_of_resuming(recipe(), recipe(*given), 5)
    assert fault.field == "data.validation_sources"
    assert f"stage.1.{source}.path=held" in fault.remedy


def test_stages_that_have_ended_need_neither_data_nor_ranks(
    recipe: Make, tokens: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for end in (".bin", ".idx", ".record.json"):
        if (file := tokens.with_name(tokens.name + end)).exists():
            copy.with_name(copy.name + end).write_bytes(file.read_bytes())
    first = ("stage.0.data.sources.0.format=tokens", f"stage.0.data.sources.0.path={copy}")
    second = ("stage.1.data.sources.0.format=tokens", f"stage.1.data.sources.0.path={tokens}")
    layouts = ("stage.0.parallel.tp=2", "stage.1.parallel.tp=1")
    settings = recipe(*steps(3, 3), *first, *second, *layouts)
    prepare_data(settings, 3)
    copy.with_name("copy.bin").unlink()
    prepare_data(settings, 3)
    with pytest.raises(UserError, match="copy"):
        prepare_data(settings, 2)
    assert list(findings(settings, 1, 3)) == []
    (finding,) = findings(settings, 1, 2)
    assert finding.fault.field == "stage.0.parallel.tp"


def test_a_run_past_its_stages_is_refused(ranks1: Ranks, recipe: Make, tmp_path: Path) -> None:
    ranks1.run(job, recipe(*steps(3, 3)), tmp_path / "run")
    with pytest.raises(Exception, match="the stages end at step 5, and the run is at step 6") as e:
        ranks1.run(job, recipe(*steps(3, 2)), tmp_path / "run", True)
    assert not isinstance(e.value, UserError)


def test_a_run_that_is_past_the_step_to_stop_at_trains_nothing(
    ranks1: Ranks, recipe: Make, tmp_path: Path
) -> None:
    settings = recipe(*steps(3, 3))
    ranks1.run(job, settings, tmp_path / "run", False, 4)
    before = losses(tmp_path / "run")
    ranks1.run(job, settings, tmp_path / "run", True, 2)
    assert losses(tmp_path / "run") == before


def test_the_recipe_of_a_checkpoint_is_that_of_its_stage(recipe: Make) -> None:
    settings = staged(recipe)
    lengths = [recipe_at(settings, step).train.seq_len for step in (0, 3, 4, 6, 9, 10, 12)]
    assert lengths == [16, 16, 24, 24, 24, 16, 16]


def test_verbs_that_look_at_one_stage_ask_which(recipe: Make) -> None:
    settings = staged(recipe)
    with pytest.raises(UserError, match=r"stages 0 to 3, .*name one by --stage"):
        recipe_of_stage(settings, None)
    with pytest.raises(UserError, match=r"--stage 0: the recipe has no \[\[stage\]\] tables"):
        recipe_of_stage(recipe(), 0)
    with pytest.raises(UserError, match="--stage 4: the recipe has the stages 0 to 3"):
        recipe_of_stage(settings, 4)
    assert recipe_of_stage(settings, 1).train.seq_len == 24
    assert recipe_of_stage(recipe(), None) == recipe()


def test_verify_keeps_what_is_frozen(recipe: Make) -> None:
    job_of_stage = plan_job(staged(recipe), [], 2, ["tp=2"], stage=2)
    small = shrink(job_of_stage.recipe, 2, job_of_stage.cases)
    assert small.train.freeze == ("embedding.*", "blocks.[02].*")
