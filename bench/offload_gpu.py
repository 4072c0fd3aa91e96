"""Part of `bench offload`: a model of three billion parameters on one GPU, in under six minutes.

Steps of 32k tokens, in bf16, with the optimizer's state

    device       all on the device: fp32 weights and moments
    serial       on the host, where every copy is waited for, gradients' during backward too
    flush        on the host, gradients leave asynchronously
    interleaved  updated on host and device at the same time

The last three train the same model, in turn. Beside each time stand the rates that were measured,
and the time of the updates that the cost model predicts from them.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.cluster.host_kernels import choose_host_kernel
from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe, TrainConfig
from colonnade.launcher.train.job import build_engine
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from colonnade.parallel.engine import Engine, connect
from colonnade.parallel.gradients import local
from colonnade.parallel.lanes.cuda import CudaLanes
from colonnade.parallel.lanes.tasks import Event, ImmediateLanes, Lanes, Run, Task
from colonnade.parallel.optimizer.offload.adamw import Offload, OffloadedAdamW
from colonnade.parallel.optimizer.offload.rates import Measured
from colonnade.parallel.passes import Passes
from colonnade.parallel.world import open_world

KINDS = {"serial": "host", "flush": "host", "interleaved": "interleaved"}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    layers: int = 28
    hidden: int = 3072
    ffn: int = 8192
    vocab: int = 32_000
    seq_len: int = 4096
    rows: int = 2
    micro_batches: int = 4
    warmup: int = 3  # the first learns when gradients are complete, then groups are placed
    steps: int = 4

    def recipe(self, offload: str) -> Recipe:
        """A Llama, whose query heads share keys and values by threes."""
        heads = self.hidden // 128
        model = ModelConfig(
            pattern="*-" * self.layers, hidden=self.hidden, ffn=self.ffn, vocab=self.vocab,
            heads=heads, kv_heads=max(1, heads // 3), head_dim=128,
        )  # fmt: skip
        train = TrainConfig(
            global_batch=self.rows * self.micro_batches, micro_batch=self.rows,
            seq_len=self.seq_len, precision="bf16", steps=self.warmup + self.steps,
        )  # fmt: skip
        return Recipe(
            model=model, train=train, optimizer=OptimizerConfig.model_validate({"offload": offload})
        )


class WaitingLanes:
    """Lanes whose every operation is waited for."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes

    def launch(self, task: Task, run: Run, after: Sequence[Event] = ()) -> Event:
        event = self.lanes.launch(task, run, after)
        self.lanes.wait(event)
        return event

    def run_on_host(self, task: Task, run: Run) -> None:
        self.lanes.run_on_host(task, run)

    def ready(self) -> Event:
        return self.lanes.ready()

    def wait(self, event: Event) -> None:
        self.lanes.wait(event)

    def passes_wait(self, event: Event) -> None:
        self.lanes.passes_wait(event)

    def passed(self, event: Event) -> bool:
        return self.lanes.passed(event)

    def finish(self) -> None:
        self.lanes.finish()


def lanes_of(device: torch.device) -> Callable[[Measured], Lanes]:
    """Returns what makes the lanes of `serial`."""

    def make(measured: Measured) -> Lanes:
        if device.type == "cuda":
            return WaitingLanes(CudaLanes(device, measured.observe))
        return WaitingLanes(ImmediateLanes(measured.observe))

    return make


def cheap_weights(model: Decoder) -> None:
    """Makes initial weights fast to draw: only times matter."""

    def fill(t: Tensor, g: Generator) -> None:
        t.fill_(0.01)

    for module in model.modules():
        if isinstance(module, ParameterModule):
            for spec in module.specs.values():
                spec.fill = fill


class Without(NamedTuple):
    """An engine's parts, without the optimizer, whose state would fill the host's memory twice."""

    model: Decoder
    mesh: DeviceMesh
    device: torch.device
    passes: Passes

    @classmethod
    def of(cls, engine: Engine) -> "Without":
        """Takes an engine apart; its optimizer is freed with it."""
        engine.passes.expect_gradients = lambda: None  # the optimizer's
        return cls(engine.model, engine.mesh, engine.device, engine.passes)

    def optimized(self, recipe: Recipe, kind: str) -> Engine:
        """Returns an engine with a new optimizer of this kind."""
        settings = recipe.optimizer.model_copy(update={"offload": KINDS[kind]})
        lanes = lanes_of(self.device) if kind == "serial" else None
        offload = Offload(choose_host_kernel("auto"), self.device, lanes=lanes)
        optimizer = OffloadedAdamW(self.model, settings, offload)
        masters = optimizer.masters()
        for name, parameter in self.model.named_parameters():
            local(masters[name]).copy_(local(parameter.detach()))
        connect(self.passes, optimizer)
        return Engine(self.model, optimizer, self.mesh, self.device, self.passes)


def random_batches(shape: Shape) -> list[Batch]:
    """The micro-batches of a step."""
    size = shape.rows, shape.seq_len
    positions = torch.arange(shape.seq_len, dtype=torch.int32).expand(size)
    documents = torch.zeros(size, dtype=torch.int32)
    found = []
    for _ in range(shape.micro_batches):
        tokens, labels = torch.randint(0, shape.vocab, (2, *size), dtype=torch.int32)
        found.append(Batch(tokens, labels, positions, documents))
    return found


def time_steps(engine: Engine, shape: Shape) -> dict[str, Any]:
    """Median seconds of steps and of their updates; memory and rates where they are measured."""
    batches, samples = random_batches(shape), [[0] * shape.rows] * shape.micro_batches
    synchronize = torch.cuda.synchronize if engine.device.type == "cuda" else (lambda: None)
    steps, updates = [], []
    for number in range(shape.warmup + shape.steps):
        if number == shape.warmup and engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        report = engine.gradients(batches, samples, 1.0, number)
        synchronize()
        middle = time.perf_counter()
        engine.update(report, 1e-4, 1.0)
        synchronize()
        if number >= shape.warmup:
            steps.append(time.perf_counter() - start)
            updates.append(time.perf_counter() - middle)
        optimizer = engine.optimizer
        if isinstance(optimizer, OffloadedAdamW) and optimizer.refit and number == 1:
            optimizer.placer.place_anew()  # by the rates of a step in which gradients left early
    found: dict[str, Any] = {
        "step_seconds": statistics.median(steps),
        "update_seconds": statistics.median(updates),
        "exposed": statistics.median(u / s for u, s in zip(updates, steps, strict=True)),
    }
    if engine.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if isinstance(optimizer, OffloadedAdamW):
        rates = optimizer.placer.measured.rates(optimizer.placer.rates)
        found |= {
            "groups": len(optimizer.groups), "groups_on_device": sum(optimizer.placement),
            "predicted_update_seconds": optimizer.placer.predicted,
            "predicted / measured": optimizer.placer.predicted / statistics.median(updates),
            "rates": asdict(rates), "host_kernel": optimizer.work.kernel.name,
            "host_bytes_per_second": rates.host * 30,
        }  # fmt: skip
    return found


def free_memory(device: torch.device) -> None:
    """Frees what nobody has any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(shape: Shape | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """The figures of all four, and their ratios; without a GPU what is missing."""
    shape = shape or Shape()
    if device is None:
        if not torch.cuda.is_available():
            return {"not run": "there is no GPU"}
        device = torch.device("cuda", 0)
    found: dict[str, Any] = {"shape": asdict(shape)}
    with open_world(0, 1, device) as world:
        engine = build_engine(shape.recipe("none"), world, cheap_weights)
        found["device"] = time_steps(engine, shape)
        del engine
        free_memory(device)
        recipe = shape.recipe("host")
        parts = Without.of(build_engine(recipe, world, cheap_weights))
        for kind in KINDS:
            free_memory(device)
            engine = parts.optimized(recipe, kind)
            found[kind] = time_steps(engine, shape)
            parts = Without.of(engine)
            del engine
        del parts
    step = {name: found[name]["step_seconds"] for name in ("device", *KINDS)}
    for name in ("serial", "flush"):
        found[f"{name} / interleaved"] = step[name] / step["interleaved"]
    found["interleaved / device"] = step["interleaved"] / step["device"]
    return found
