"""Reports a run's progress: a live line, metrics.jsonl, TensorBoard, Weights & Biases."""

import sys
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import torch

from colonnade.launcher.cluster.devices import peak_flops
from colonnade.launcher.cluster.memory import peak_gib
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.stages import TrainingStage, training_stages
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.run_files import METRICS
from colonnade.launcher.train.lines import Lines, without_nan
from colonnade.launcher.train.loads import LoadWatch
from colonnade.launcher.train.metrics import curves
from colonnade.launcher.train.watch.endpoint import Metrics
from colonnade.models.shapes import measure
from colonnade.parallel.world import World


def device_peak(device: torch.device) -> float | None:
    """The bf16 peak of a GPU in FLOP/s; None on CPU, and for an unknown GPU."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def duration(seconds: float) -> str:
    """Formats seconds: 75 as `1:15`, 3600 as `1:00:00`."""
    minutes, remaining = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{remaining:02}" if hours else f"{minutes}:{remaining:02}"


def not_installed(package: str) -> UserError:
    """The error for a report whose library is not installed."""
    return UserError(
        f"train.{package} = true, but {package} is not installed: "
        f"pip install 'colonnade[{package}]', or leave the field out"
    )


def open_tensorboard(run: Path, start: int) -> Any:
    """Opens a TensorBoard writer in the run's folder, which drops recorded steps after `start`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise not_installed("tensorboard") from missing
    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)


def open_wandb(run: Path, recipe: Recipe) -> Any:
    """Opens a Weights & Biases run named after the folder; a resumed run opens the same one.

    The folder stores its identifier. The step is logged with the values as the axis of all metrics:
    wandb's own step counter refuses to go back to the checkpoint of an interrupted run.
    """
    try:
        import wandb
    except ImportError as missing:
        raise not_installed("wandb") from missing
    path = run / "wandb-id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    writer = wandb.init(
        project="colonnade",
        name=run.name,
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=run,
        config=recipe.model_dump(),
    )
    writer.define_metric("*", step_metric="step")
    return writer


class Monitor:
    """Writes the reports of rank 0.

    A run that was interrupted after its last checkpoint has recorded steps after `start`, which
    will be trained again. metrics.jsonl keeps them, and its readers choose (`read_metrics`);
    TensorBoard drops them.

    Attributes:
        attempt: the number of this start of the run, which every row has.
        rewinds: of this attempt up to now, which every row has after the first.
        window: seconds and tokens of the last steps, for a moving average.
        flops: training FLOPs per token.
        loads: the watch on the loads of experts.
        metrics: that are served to others; None: none are.
        live: stdout is a terminal, where the line of a step overwrites that of the step before.
        unfinished: the live line has not been ended by a newline.
    """

    def __init__(
        self, run: Path, recipe: Recipe, stage: TrainingStage, start: int, attempt: int
    ) -> None:
        self.steps = training_stages(recipe)[-1].stop
        self.path, self.attempt, self.rewinds = run / METRICS, attempt, 0
        self.lines = Lines(self.path)
        self.tensorboard = open_tensorboard(run, start) if recipe.train.tensorboard else None
        self.wandb = open_wandb(run, recipe) if recipe.train.wandb else None
        self.metrics: Metrics | None = None
        self.live, self.unfinished = sys.stdout.isatty(), False
        self.last_print = 0.0
        self.begin_stage(stage)

    def begin_stage(self, stage: TrainingStage) -> None:
        """From now on steps are those of a training stage."""
        recipe = stage.recipe
        self.window = deque[tuple[float, int]](maxlen=20)
        self.flops = measure(recipe.model, recipe.train.seq_len).flops_per_token
        self.loads = LoadWatch(recipe)

    def step(self, metrics: dict[str, Any], tokens: int, world: World) -> None:
        """Records one step, and prints its line.

        Args:
            metrics: at least `step` (from 1), `loss`, `lr`, `grad_norm` and `seconds`; values are
                numbers, or objects of finite numbers, as of the loads of experts.
            tokens: of this step on all ranks.
            world: this rank among all ranks.
        """
        rate, peak_memory = tokens / metrics["seconds"], peak_gib(world.device)
        self.window.append((metrics["seconds"], tokens))
        metrics["tokens_per_s"] = round(rate, 1)
        metrics["memory_gib"] = round(peak_memory, 3)
        if peak := device_peak(world.device):
            metrics["mfu"] = round(rate * self.flops / (peak * world.size), 4)
        self.record(metrics)
        seconds = sum(t for t, _ in self.window)
        remaining = (self.steps - metrics["step"]) * seconds / len(self.window)
        self.print_progress(
            f"step {metrics['step']:>{len(str(self.steps))}}/{self.steps}  "
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  |g| {metrics['grad_norm']:.2f}  "
            f"{sum(n for _, n in self.window) / seconds:,.0f} tokens/s  "
            f"{peak_memory:.2f} GiB  ETA {duration(remaining)}",
            last=metrics["step"] == self.steps,
        )

    def record(self, metrics: dict[str, Any]) -> None:
        """Writes one object: to metrics.jsonl with time and attempt, to other sinks its `curves`.

        A number that is not finite is written as null.
        """
        plain = without_nan(metrics)
        segment = {"attempt": self.attempt} | ({"rewinds": self.rewinds} if self.rewinds else {})
        self.lines.append(plain | {"time": round(time.time(), 3)} | segment)
        numbers = curves(plain)
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, metrics["step"])
        if self.metrics:
            self.metrics.update(plain | {"attempt": self.attempt})
        if self.wandb:
            self.wandb.log(numbers | {"step": metrics["step"]})

    def print_progress(self, text: str, last: bool) -> None:
        """Overwrites the live line; without a terminal, prints a line every ten seconds.

        The line of the `last` step is always printed, and ended by a newline.
        """
        if self.live:
            print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
            self.unfinished = not last
        elif last or time.perf_counter() - self.last_print > 10:
            print(text, flush=True)
            self.last_print = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints lines of text that stay: they replace the live line, which comes again below."""
        print(f"\r\033[K{text}" if self.live else text, flush=True)
        self.unfinished = False

    def close(self) -> None:
        """Closes every sink."""
        if self.unfinished:
            print()
        self.lines.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
