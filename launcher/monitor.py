"""What a run tells while it trains: a live line, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe import Recipe

# dense bf16 peak, FLOP/s, from the vendor's data sheets (without sparsity)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """bf16 peak of a known GPU, by its name."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in device_name), None)


def duration(seconds: float) -> str:
    """`75` as `1:15`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def open_tensorboard(run: Path) -> Any:
    """A TensorBoard writer into the run's folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise UserError(
            "train.tensorboard = true, but tensorboard is not installed: "
            "pip install 'colonnade[tensorboard]', or leave the field out"
        ) from missing
    return SummaryWriter(str(run / "tensorboard"))


def open_wandb(run: Path, recipe: Recipe) -> Any:
    """A Weights & Biases run named after the folder."""
    try:
        import wandb
    except ImportError as missing:
        raise UserError(
            "train.wandb = true, but wandb is not installed: "
            "pip install 'colonnade[wandb]', or leave the field out"
        ) from missing
    return wandb.init(project="colonnade", name=run.name, dir=run, config=recipe.model_dump())


class Monitor:
    """Rank 0's reports. Metrics of steps after `start`, left by a cut-off run, are dropped."""

    def __init__(self, run: Path, recipe: Recipe, start: int) -> None:
        self.steps, self.window = recipe.train.steps, deque[tuple[float, int]](maxlen=20)
        self.path = run / "metrics.jsonl"
        self.keep_before(start)
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = open_tensorboard(run) if recipe.train.tensorboard else None
        self.wandb = open_wandb(run, recipe) if recipe.train.wandb else None
        self.live = sys.stdout.isatty()
        self.last_print = 0.0
        self.clock = time.perf_counter()

    def keep_before(self, start: int) -> None:
        """Drop what an interrupted run wrote past its last checkpoint."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= start]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        self.path.write_text(text, encoding="utf-8")

    def restart_clock(self) -> None:
        """Leave out what happened since the last step (validation, a checkpoint)."""
        self.clock = time.perf_counter()

    def step(self, metrics: dict[str, Any], tokens: int) -> None:
        """Record one step. `metrics` holds at least `step`, counted from 1, and `loss`."""
        now = time.perf_counter()
        self.window.append((now - self.clock, tokens))
        self.clock = now
        metrics["tokens_per_s"] = round(tokens / self.window[-1][0], 1)
        self.record(metrics)
        rate = sum(n for _, n in self.window) / sum(t for t, _ in self.window)
        left = (self.steps - metrics["step"]) * sum(t for t, _ in self.window) / len(self.window)
        self.line(
            f"step {metrics['step']:>{len(str(self.steps))}}/{self.steps}  "
            f"loss {metrics['loss']:.4f}  {rate:,.0f} tokens/s  ETA {duration(left)}",
            last=metrics["step"] == self.steps,
        )

    def record(self, metrics: dict[str, Any]) -> None:
        """Write one object to every sink."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, metrics["step"])
        if self.wandb:
            self.wandb.log(numbers, step=metrics["step"])

    def line(self, text: str, last: bool) -> None:
        """Overwrite the live line; without a terminal print one every ten seconds."""
        if self.live:
            print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
        elif last or time.perf_counter() - self.last_print > 10:
            print(text, flush=True)
            self.last_print = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        print(f"\r\033[K{text}" if self.live else text, flush=True)

    def close(self) -> None:
        """Finish every sink."""
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
