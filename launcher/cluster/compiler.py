"""Finds the C++ compiler of this machine, for compiled sub-blocks and for compiled kernels."""

import platform
import subprocess
import sysconfig

import torch

from colonnade.launcher.errors import UserError


def cpp_compiler() -> str | None:
    """Returns the compiler that PyTorch's Inductor uses: that of CXX, else g++ (clang++ on macOS).

    None: it is not installed.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def missing_for_compiling() -> str | None:
    """What `train.compile` needs on a CPU and is not installed, with the remedy; None: nothing."""
    compiler = cpp_compiler()
    if compiler is None:
        return "no C++ compiler: install g++, or name one in the environment variable CXX"
    if platform.system() != "Linux":
        return None
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")}
    command = [compiler, "-E", "-x", "c++", *(f"-I{folder}" for folder in folders), "-"]
    finished = subprocess.run(command, input=b"#include <Python.h>", capture_output=True)
    if finished.returncode:
        return f"{compiler} finds no Python.h: install the headers of Python (python3-dev)"
    return None


def check_compiling(wanted: bool, device: torch.device) -> None:
    """Raises UserError if the sub-blocks are to be compiled on a CPU that lacks the tools."""
    if wanted and device.type == "cpu" and (missing := missing_for_compiling()):
        raise UserError(f"train.compile = True: {missing}; or set train.compile = false")
