"""Chooses the kernel of AdamW over host memory: the best that is available, equal on all ranks."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from colonnade.kernels.host_adamw import (
    CompiledKernel,
    DeepSpeedKernel,
    HostKernel,
    TorchKernel,
    compile_library,
)
from colonnade.kernels.native import NativeError
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.cluster.compiler import cpp_compiler
from colonnade.launcher.cluster.environment import cache_folder
from colonnade.launcher.errors import Fault, UserError

FIELD = "optimizer.host_kernel"
AUTO = "auto"


def compiled_kernel() -> CompiledKernel:
    """Compiles the kernel, or loads it from the cache folder.

    Where that folder cannot be written, or nothing loaded from it, the next run compiles again.

    Raises:
        NativeError: there is no compiler, or it fails.
    """
    compiler = cpp_compiler()
    if compiler is None:
        raise NativeError("there is no C++ compiler: neither g++, nor a program that CXX names")
    try:
        return CompiledKernel(compile_library(cache_folder(), compiler))
    except OSError:
        pass
    try:
        with tempfile.TemporaryDirectory() as folder:
            return CompiledKernel(compile_library(Path(folder), compiler))
    except OSError as error:
        raise NativeError(f"the compiled kernel cannot be written or loaded: {error}") from error


# In the order of preference; the last is available everywhere.
KERNELS: dict[str, Callable[[], HostKernel]] = {
    "compiled": compiled_kernel,
    "deepspeed": DeepSpeedKernel,
    "torch": TorchKernel,
}
DESCRIPTIONS = {
    "compiled": "ours in one pass, compiled for this processor",
    "deepspeed": "DeepSpeedCPUAdam between two more passes",
    "torch": "torch's fused operator between two more passes",
}
REMEDIES = {
    "compiled": "install g++, or name a C++ compiler in the environment variable CXX",
    "deepspeed": "pip install deepspeed, and install g++ and ninja",
}


def choose_host_kernel(wanted: str) -> HostKernel:
    """The kernel alone of `host_kernel_choice`."""
    return host_kernel_choice(wanted)[0]


def host_kernel_choice(wanted: str) -> tuple[HostKernel, str]:
    """Chooses for this process alone.

    Args:
        wanted: `optimizer.host_kernel`: one of KERNELS, or `auto`, the first that is available.

    Returns:
        The kernel; which one it is and why, as text.

    Raises:
        UserError: the wanted one is not available, or there is none of that name.
    """
    return _choose(wanted, lambda attempt: [attempt()])


def settle_host_kernel(
    wanted: str, wait_for_all: Callable[[], None] | None = None
) -> tuple[HostKernel, str]:
    """Chooses a kernel that is available on every rank; collective: all-gathers the outcomes.

    Ranks must agree, since kernels differ in their last bits, and shards are gathered from all.
    `wanted`, results and errors are those of `host_kernel_choice`; `wait_for_all` as for
    `on_all_ranks`, since DeepSpeed compiles for a minute.
    """
    return _choose(wanted, partial(on_all_ranks, wait_for_all=wait_for_all))


Attempt = Callable[[], str | None]  # returns why a kernel is not available


def _choose(wanted: str, run: Callable[[Attempt], list[str | None]]) -> tuple[HostKernel, str]:
    """Tries the kernels in order; `run` runs an attempt on all ranks, and returns its results."""
    if wanted not in (AUTO, *KERNELS):
        raise UserError(str(Fault(FIELD, wanted, f"use one of {', '.join((AUTO, *KERNELS))}")))
    available: dict[str, HostKernel] = {}

    def attempt(name: str) -> str | None:
        try:
            available[name] = KERNELS[name]()
        except NativeError as error:
            return str(error)
        return None

    missing: dict[str, str] = {}
    for name in KERNELS if wanted == AUTO else (wanted,):
        reasons = run(partial(attempt, name))
        failed = [rank for rank, reason in enumerate(reasons) if reason]
        if not failed:
            why = "" if wanted == AUTO else f", as {FIELD} says"
            others = "".join(f"; not {other}: {reason}" for other, reason in missing.items())
            return available[name], f"{name}: {DESCRIPTIONS[name]}{why}{others}"
        where = f"on rank {failed[0]} " if len(reasons) > 1 else ""
        missing[name] = f"{where}{reasons[failed[0]]}"
    remedy = f"{missing[wanted]}; {REMEDIES[wanted]}, or set it to '{AUTO}'"
    raise UserError(str(Fault(FIELD, wanted, remedy)))
