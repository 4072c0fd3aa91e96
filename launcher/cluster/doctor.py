"""`doctor`: what this machine has, and which kernel serves each operator, and why."""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sysconfig
from typing import Any

import torch
import torch.distributed as dist

from colonnade.kernels.linear import has_onednn, usual_choice
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.cluster.products import known_choice
from colonnade.launcher.errors import UserError

OPTIONAL = {
    "datasets": "text, JSON lines, parquet and hub data (extra: text)",
    "tokenizers": "tokenizer.json files (extra: text)",
    "matplotlib": "the loss plot (extra: plot)",
    "tensorboard": "train.tensorboard (extra: tensorboard)",
    "wandb": "train.wandb (extra: wandb)",
    "transformers": "bench step, mixers, moe (extra: bench)",
}


def version(package: str) -> str:
    """Installed version, or what is missed without it."""
    if importlib.util.find_spec(package) is None:
        return f"not installed: {OPTIONAL.get(package, 'required')}"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def devices() -> dict[str, Any]:
    """Processors and memory that a run would use."""
    found: dict[str, Any] = {
        "cpu": f"{platform.machine()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    }
    if not torch.cuda.is_available():
        found["gpu"] = "none: runs use the CPU"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    return found


def backends() -> dict[str, str]:
    """What ranks can talk through."""
    return {
        "gloo": "yes: CPU ranks"
        if dist.is_gloo_available()
        else "no: several CPU ranks cannot run",
        "nccl": "yes: GPU ranks" if dist.is_nccl_available() else "no: not in this build of torch",
    }


def operators() -> dict[str, str]:
    """Which kernel serves each operator here."""
    cuda = torch.cuda.is_available()
    where = "on this GPU" if cuda else "on this CPU"
    if cuda:
        product = "cuBLAS, PyTorch's choice on a GPU"
    elif has_onednn(torch.empty(0)):
        measured = known_choice()
        choice = measured or usual_choice()
        on = ", ".join(name for name, onednn in choice.items() if onednn) or "nothing"
        how = "measured here" if measured else "not measured yet: the first run does"
        product = f"fp32 on oneDNN: {on}; else MKL ({how})"
    else:
        product = "PyTorch's choice: this build or processor has no oneDNN"
    return {
        "linear": product,
        "attention": f"scaled_dot_product_attention, flash kernel where it serves {where}; "
        "packed documents through a mask",
        "rms_norm": "torch's fused kernel" if cuda else "ours: keeps one scale a row",
        "activation": "ours: keeps only its inputs",
        "ssd": "ours, chunked, from matrix products",
        "conv": "ours, shifted products: faster than conv1d on CPUs",
        "experts": "torch's grouped_mm" if cuda else "a product per expert",
        "loss": "ours, chunked: never holds all logits",
    }


def lacks_for_compiling() -> str | None:
    """What `train.compile` needs on a CPU and does not find, with the remedy; None: nothing."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler: install g++, or name one in the environment variable CXX"
    if platform.system() != "Linux":
        return None
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")}
    command = [compiler, "-E", "-x", "c++", *(f"-I{folder}" for folder in folders), "-"]
    tried = subprocess.run(command, input=b"#include <Python.h>", capture_output=True)
    if tried.returncode:
        return f"{compiler} finds no Python.h: install the headers of Python (python3-dev)"
    return None


def check_compiling(wanted: bool, device: torch.device) -> None:
    """A UserError where the sub-blocks are to be compiled and cannot be."""
    if wanted and device.type == "cpu" and (lack := lacks_for_compiling()):
        raise UserError(f"train.compile = True: {lack}; or set train.compile = false")


def doctor() -> dict[str, Any]:
    """Everything `colonnade doctor` reports, one value a line."""
    required = ("torch", "numpy", "pydantic", "safetensors", "colonnade")
    report: dict[str, Any] = {"python": platform.python_version()}
    report |= {name: version(name) for name in (*required, *OPTIONAL)}
    report |= devices() | backends()
    report["train.compile"] = lacks_for_compiling() or "yes: there is a C++ compiler"
    return report | {f"kernel: {name}": served for name, served in operators().items()}
