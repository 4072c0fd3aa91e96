"""The choice of a kernel for AdamW over host memory, on one rank and equal on several."""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks

from colonnade.launcher.cluster import host_kernels
from colonnade.launcher.cluster.compiler import cpp_compiler
from colonnade.launcher.cluster.doctor import doctor
from colonnade.launcher.cluster.host_kernels import (
    choose_host_kernel,
    host_kernel_choice,
    settle_host_kernel,
)
from colonnade.launcher.errors import UserError

NO_COMPILER = {"cpp.cxx": (None, "no-such-compiler")}
ABSENT = ("deepspeed", "deepspeed.ops.adam")
needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and no DeepSpeed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in ABSENT:
        monkeypatch.setitem(sys.modules, module, None)
    return tmp_path / "colonnade"


@needs_compiler
def test_the_compiled_kernel_comes_first(cache: Path) -> None:
    kernel, why = host_kernel_choice("auto")
    assert kernel.name == choose_host_kernel("compiled").name == "compiled"
    assert why.startswith("compiled: ours in one pass")
    assert "host_adamw" in next(cache.iterdir()).name
    assert doctor()["kernel: host adamw"] == why
    assert host_kernel_choice("compiled")[1].endswith("as optimizer.host_kernel says")


def test_without_a_compiler_another_kernel_serves() -> None:
    with torch._inductor.config.patch(NO_COMPILER):
        kernel, why = host_kernel_choice("auto")
        assert kernel.name == "torch"
        assert "not compiled: there is no C++ compiler: neither g++, nor a program that" in why
        assert "; not deepspeed: DeepSpeed cannot" in why
        assert doctor()["kernel: host adamw"] == why
        with pytest.raises(UserError, match=r"optimizer\.host_kernel = 'compiled': .* install g\+"):
            choose_host_kernel("compiled")
    assert choose_host_kernel("torch").name == "torch"


def test_deepspeed_comes_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Present:
        name = "deepspeed"

    monkeypatch.setitem(host_kernels.KERNELS, "deepspeed", Present)  # type: ignore[arg-type]
    with torch._inductor.config.patch(NO_COMPILER):
        assert choose_host_kernel("auto").name == "deepspeed"


def test_mistakes_name_the_field() -> None:
    with pytest.raises(UserError, match=r"optimizer\.host_kernel = 'deepspeed': .*pip install dee"):
        choose_host_kernel("deepspeed")
    with pytest.raises(UserError, match=r"'fast': use one of auto, compiled, deepspeed, torch"):
        choose_host_kernel("fast")


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert choose_host_kernel("compiled").name == "compiled"


def settled_ranks(rank: int, size: int, cache: str, wanted: str, without: int) -> str:
    """The name of the kernel that ranks agree on, or their error."""
    lacking = NO_COMPILER if rank == without else {}
    with (
        patch.dict(os.environ, {"XDG_CACHE_HOME": cache}),
        patch.dict(sys.modules, dict.fromkeys(ABSENT)),
        torch._inductor.config.patch(lacking),
    ):
        try:
            return settle_host_kernel(wanted)[0].name
        except UserError as error:
            return str(error)


@needs_compiler
def test_ranks_agree(ranks2: Ranks, tmp_path: Path) -> None:
    def settled(wanted: str, without: int) -> list[str]:
        return ranks2.run(settled_ranks, str(tmp_path), wanted, without)

    assert settled("auto", -1) == ["compiled"] * 2
    assert settled("auto", 1) == ["torch"] * 2
    errors = settled("compiled", 1)
    assert errors[0] == errors[1]
    assert "on rank 1 there is no C++ compiler" in errors[0]


def test_other_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(host_kernels.KERNELS, "compiled", broken)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        choose_host_kernel("auto")
