"""Upper bounds of sizes, and schedules that an override of train.steps shortens."""

from collections.abc import Callable
from pathlib import Path

import pytest

from colonnade.launcher.errors import Fault, RecipeError
from colonnade.launcher.recipe.load import load_recipe

Write = Callable[[str], Path]
Faults = Callable[..., list[Fault]]


@pytest.mark.parametrize(
    "override",
    [
        f"model.hidden={10**30}",
        f"model.repeat={10**9}",
        "model.repeat=4096",  # of four symbols: a row of 16,384 at most
        f"model.mup_base={{hidden = {10**30}}}",
        f"train.global_batch={10**30}",
        f"train.ramp_steps={10**30}",
        f"parallel.tp={10**30}",
        f"optimizer.warmup=1{'0' * 5000}",  # more digits than Python turns into a number
    ],
)
def test_sizes_above_the_bounds_are_faults(faults: Faults, override: str) -> None:
    field, value = override.split("=", 1)
    text = 'model.pattern = "M-*EM"\n' if value == "4096" else ""
    (fault,) = faults(override, text=text)
    assert field in fault.field


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "ramp"), [(100, 20, 30, 50), (60, 12, 18, 30), (2, 0, 1, 1)]
)
def test_a_shorter_run_shortens_its_schedule(
    write: Write, steps: int, warmup: int, decay: int, ramp: int
) -> None:
    """Shortens only where the schedule no longer fits, and never an overridden field."""
    path = write(
        'optimizer = {schedule = "wsd", warmup = 20, decay = 30}\n'
        "train = {steps = 100, ramp_batch = 4, ramp_steps = 50, global_batch = 16, micro_batch = 4}"
    )
    notified: list[str] = []
    recipe = load_recipe(path, [f"train.steps={steps}"], notify=notified.append)
    lengths = recipe.optimizer.warmup, recipe.optimizer.decay, recipe.train.ramp_steps
    assert lengths == ((20, 30, 50) if steps == 60 else (warmup, decay, ramp))
    assert bool(notified) == (steps == 2)
    with pytest.raises(RecipeError, match="warmup"):
        load_recipe(path, ["train.steps=10", "optimizer.warmup=20"])
