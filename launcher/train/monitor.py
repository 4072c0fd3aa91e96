"""What a run tells while it trains: a live line, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import math
import sys
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import torch

from colonnade.launcher.cluster.memory import peak_gib
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.metrics import read_metrics
from colonnade.models.shapes import measure
from colonnade.parallel.world import World

# dense bf16 peak, FLOP/s, from the vendor's data sheets (without sparsity)
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def device_peak(here: World) -> float | None:
    """bf16 peak of this rank's GPU in FLOP/s, if it is a known one."""
    if here.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(here.device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def duration(seconds: float) -> str:
    """`75` as `1:15`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def not_installed(package: str) -> UserError:
    """A report was asked for whose library is missing."""
    return UserError(
        f"train.{package} = true, but {package} is not installed: "
        f"pip install 'colonnade[{package}]', or leave the field out"
    )


def open_tensorboard(run: Path, start: int) -> Any:
    """A TensorBoard writer into the run's folder; steps after `start` are shown anew."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise not_installed("tensorboard") from missing
    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)


def open_wandb(run: Path, recipe: Recipe) -> Any:
    """A Weights & Biases run named after the folder: the same one whenever the run goes on.

    Its identifier is kept in the folder. Values have their step beside them, for wandb's own
    counter refuses to go back to the checkpoint of a run that was cut off.
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
    """Rank 0's reports. Metrics of steps after `start`, left by a cut-off run, are dropped."""

    def __init__(self, run: Path, recipe: Recipe, start: int) -> None:
        self.steps, self.window = recipe.train.steps, deque[tuple[float, int]](maxlen=20)
        self.path = run / "metrics.jsonl"
        self.keep_before(start)
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = open_tensorboard(run, start) if recipe.train.tensorboard else None
        self.wandb = open_wandb(run, recipe) if recipe.train.wandb else None
        self.flops = measure(recipe.model, recipe.train.seq_len).flops_per_token
        self.live, self.unfinished = sys.stdout.isatty(), False
        self.last_print = 0.0
        self.clock = time.perf_counter()

    def keep_before(self, start: int) -> None:
        """Drop what a run wrote past its checkpoint, and the last validation if it comes again."""

        def stays(row: dict[str, Any]) -> bool:
            again = start == self.steps and "validation_loss" in row
            return row["step"] < start or (row["step"] == start and not again)

        text = "".join(json.dumps(row) + "\n" for row in read_metrics(self.path) if stays(row))
        coming = self.path.with_suffix(".coming")
        coming.write_text(text, encoding="utf-8")
        coming.replace(self.path)

    def restart_clock(self) -> None:
        """Leave out what happened since the last step (validation, a checkpoint)."""
        self.clock = time.perf_counter()

    def step(self, metrics: dict[str, Any], tokens: int, here: World) -> None:
        """Record one step: `metrics` holds at least `step`, from 1, `loss`, `lr`, `grad_norm`."""
        now = time.perf_counter()
        rate = tokens / (now - self.clock)
        self.window.append((now - self.clock, tokens))
        self.clock = now
        metrics["tokens_per_s"] = round(rate, 1)
        if peak := device_peak(here):
            metrics["mfu"] = round(rate * self.flops / (peak * here.size), 4)
        self.record(metrics)
        seconds = sum(t for t, _ in self.window)
        left = (self.steps - metrics["step"]) * seconds / len(self.window)
        self.line(
            f"step {metrics['step']:>{len(str(self.steps))}}/{self.steps}  "
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  |g| {metrics['grad_norm']:.2f}  "
            f"{sum(n for _, n in self.window) / seconds:,.0f} tokens/s  "
            f"{peak_gib(here.device):.2f} GiB  ETA {duration(left)}",
            last=metrics["step"] == self.steps,
        )

    def record(self, metrics: dict[str, Any]) -> None:
        """Write one object to every sink; what is not finite is null, as JSON has no NaN."""
        plain = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.file.write(json.dumps(plain, allow_nan=False) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in plain.items() if v is not None and k != "step"}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, metrics["step"])
        if self.wandb:
            self.wandb.log(numbers | {"step": metrics["step"]})

    def line(self, text: str, last: bool) -> None:
        """Overwrite the live line; without a terminal print one every ten seconds."""
        if self.live:
            print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
            self.unfinished = not last
        elif last or time.perf_counter() - self.last_print > 10:
            print(text, flush=True)
            self.last_print = time.perf_counter()

    def say(self, text: str) -> None:
        """Print lines of their own, above the live one."""
        print(f"\r\033[K{text}" if self.live else text, flush=True)
        self.unfinished = False

    def close(self) -> None:
        """Finish every sink."""
        if self.unfinished:
            print()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
