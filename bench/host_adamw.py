"""AdamW over host memory: one pass beside three, DeepSpeedCPUAdam, and the memory's bandwidth.

All work on the same tensors, larger than the caches, in turn. The floor is a loop that moves the
same bytes per parameter (reads four fp32 streams, writes three of them and one of 16 bits) with as
many threads, and does one addition where the kernel does an update: no kernel can be much faster.
"""

import ctypes
import platform
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colonnade.bench.timing import alternate, median_ratio
from colonnade.kernels.host_adamw import (
    AdamWStep,
    DeepSpeedKernel,
    HostKernel,
    SharePool,
    TorchKernel,
)
from colonnade.kernels.native import NativeError, compile_source
from colonnade.launcher.cluster.compiler import cpp_compiler
from colonnade.launcher.cluster.host_kernels import choose_host_kernel

TRAFFIC = Path(__file__).with_name("host_traffic.cpp")
UPDATE = 28  # bytes of a parameter's update: reads gradient, master, moments; writes the last three
ONE_PASS = UPDATE + 2  # and writes the bf16 weight
THREE_PASSES = UPDATE + 8 + 6  # scales the gradient before, and reads the master again behind
STEP = AdamWStep(5, 1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, scale=0.999)

OURS, THREE, FLOOR = "one pass", "three passes", "floor"
BARE = "one pass, no weight"
DEEPSPEED, DEEPSPEED_THREE = "DeepSpeedCPUAdam", "DeepSpeedCPUAdam, clip and cast"


def run(elements: int = 2**27, rounds: int = 15) -> dict[str, Any]:
    """Parameters and bytes per second of each on fp32 state and gradients, and their ratios."""
    master, grad, exp_avg, exp_avg_sq = (torch.randn(elements) for _ in range(4))
    tensors = (master, grad, exp_avg, exp_avg_sq.abs_())
    weight = torch.empty(elements, dtype=torch.bfloat16)

    def update(
        kernel: HostKernel, weight: Tensor | None = weight, step: AdamWStep = STEP
    ) -> Callable[[], object]:
        return lambda: kernel(*tensors, weight, step)

    compiled = choose_host_kernel("compiled")
    moved = {OURS: ONE_PASS, BARE: UPDATE, THREE: THREE_PASSES, FLOOR: ONE_PASS}
    candidates: dict[str, Callable[[], object]] = {
        OURS: update(compiled),
        BARE: update(compiled, None),
        THREE: update(TorchKernel()),
        FLOOR: traffic((*tensors, weight)),
    }
    missing: dict[str, Any] = {}
    try:
        peer = DeepSpeedKernel()
    except NativeError as error:
        missing[DEEPSPEED] = str(error)
    else:
        candidates[DEEPSPEED] = update(peer, None, replace(STEP, scale=1.0))  # its operator alone
        candidates[DEEPSPEED_THREE] = update(peer)
        moved |= {DEEPSPEED: UPDATE, DEEPSPEED_THREE: THREE_PASSES}
    seconds = alternate(candidates, rounds, warmup=2)
    report: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "parameters": elements,
    }
    for name, times in seconds.items():
        speed = elements / statistics.median(times)
        report[f"{name}: parameters/s"] = speed
        report[f"{name}: bytes/s, {moved[name]} a parameter"] = speed * moved[name]
    for name in seconds:
        if name not in (OURS, BARE):
            report[f"speed, {OURS} / {name}"] = median_ratio(seconds[name], seconds[OURS])
    if DEEPSPEED in seconds:  # the same work: it writes no weight
        report[f"speed, {BARE} / {DEEPSPEED}"] = median_ratio(seconds[DEEPSPEED], seconds[BARE])
    return report | missing


def traffic(tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    """Compiles the floor's loop; returns a function that runs it over the tensors."""
    compiler = cpp_compiler()
    assert compiler is not None  # the kernel has been compiled
    with tempfile.TemporaryDirectory() as folder:
        function = ctypes.CDLL(str(compile_source(TRAFFIC, Path(folder), compiler))).traffic
    function.restype = None
    pool = SharePool()

    def share(start: int, end: int) -> None:
        pointers = (ctypes.c_void_p(t.data_ptr() + start * t.element_size()) for t in tensors)
        function(*pointers, ctypes.c_size_t(end - start))

    return lambda: pool.run(share, tensors[0].numel())


def processor() -> str:
    """The name of the processor, as Linux reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    facts = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    names = [facts[name] for name in ("model name", "cpu family", "model") if name in facts]
    return ", ".join(names) or platform.processor()
