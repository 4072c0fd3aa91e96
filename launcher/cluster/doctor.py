"""`doctor`: reports devices, backends and packages, and which kernel serves each operator."""

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch
import torch.distributed as dist

from colonnade.kernels.linear import has_onednn, usual_choice
from colonnade.launcher.cluster.compiler import missing_for_compiling
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.cluster.host_kernels import AUTO, host_kernel_choice
from colonnade.launcher.cluster.products import cached_choice

OPTIONAL = {
    "datasets": "text, JSON lines, parquet and hub data (extra: text)",
    "tokenizers": "tokenizer.json files (extra: text)",
    "matplotlib": "the loss plot (extra: plot)",
    "tensorboard": "train.tensorboard (extra: tensorboard)",
    "wandb": "train.wandb (extra: wandb)",
    "deepspeed": "optimizer.host_kernel = 'deepspeed', bench offload (pip install deepspeed)",
    "transformers": "bench step, mixers, moe (extra: bench)",
}


def version(package: str) -> str:
    """The installed version of a package, or what it is needed for."""
    if importlib.util.find_spec(package) is None:
        return f"not installed: {OPTIONAL.get(package, 'required')}"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def devices() -> dict[str, Any]:
    """The processors that a run would use, and the memory of each GPU."""
    report: dict[str, Any] = {
        "cpu": f"{platform.machine()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    }
    if not torch.cuda.is_available():
        report["gpu"] = "none: runs use the CPU"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        report[f"gpu {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    return report


def backends() -> dict[str, str]:
    """The backends of torch.distributed that this build of PyTorch has."""
    return {
        "gloo": "yes: CPU ranks"
        if dist.is_gloo_available()
        else "no: several CPU ranks cannot run",
        "nccl": "yes: GPU ranks" if dist.is_nccl_available() else "no: not in this build of torch",
    }


def operators() -> dict[str, str]:
    """The kernel that serves each operator on this machine, and why."""
    cuda = torch.cuda.is_available()
    processor = "on this GPU" if cuda else "on this CPU"
    if cuda:
        linear = "cuBLAS, PyTorch's choice on a GPU"
    elif has_onednn(torch.empty(0)):
        measured = cached_choice()
        choice = measured or usual_choice()
        classes = ", ".join(name for name, onednn in choice.items() if onednn) or "nothing"
        source = "measured here" if measured else "not measured yet: the first run does"
        linear = f"fp32 on oneDNN: {classes}; else MKL ({source})"
    else:
        linear = "PyTorch's choice: this build or processor has no oneDNN"
    return {
        "linear": linear,
        "attention": f"scaled_dot_product_attention, flash kernel where it serves {processor}; "
        "packed documents through a mask",
        "rms_norm": "torch's fused kernel" if cuda else "ours: keeps one scale a row",
        "activation": "ours: keeps only its inputs",
        "ssd": "ours, chunked, from matrix products",
        "conv": "ours, shifted products: faster than conv1d on CPUs",
        "experts": "torch's grouped_mm" if cuda else "a product per expert",
        "loss": "ours, chunked: never holds all logits",
        "host adamw": host_kernel_choice(AUTO)[1],
    }


def doctor() -> dict[str, Any]:
    """The report of `colonnade doctor`, one value a line."""
    required = ("torch", "numpy", "pydantic", "safetensors", "colonnade")
    report: dict[str, Any] = {"python": platform.python_version()}
    report |= {name: version(name) for name in (*required, *OPTIONAL)}
    report |= devices() | backends()
    report["train.compile"] = missing_for_compiling() or "yes: there is a C++ compiler"
    return report | {f"kernel: {name}": kernel for name, kernel in operators().items()}
