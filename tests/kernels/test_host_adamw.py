"""AdamW over host memory against torch.optim.AdamW: the fused one's bits, the plain one in fp64."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from colonnade.kernels import host_adamw
from colonnade.kernels.host_adamw import (
    AdamWStep,
    CompiledKernel,
    DeepSpeedKernel,
    HostKernel,
    TorchKernel,
    compile_library,
    shares,
)
from colonnade.launcher.cluster.compiler import cpp_compiler

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SIZES = (0, 1, 63, 64, 65, 1000, 300_001)  # the last on several threads
USUAL = AdamWStep(1, lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, scale=0.37)
STEPS = {
    "usual": USUAL,
    "no decay": replace(USUAL, weight_decay=0.0),
    "not clipped": replace(USUAL, scale=1.0),
    "others": replace(USUAL, lr=0.1, beta1=0.3, beta2=0.5, eps=0.1, weight_decay=1.0, scale=5.0),
    "no momentum": replace(USUAL, beta1=0.0, beta2=0.0),
}


class State(NamedTuple):
    """Master weight and moments of one update."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def to(self, dtype: torch.dtype) -> "State":
        return State(*(t.to(dtype, copy=True) for t in self))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledKernel:
    compiler = cpp_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    return CompiledKernel(compile_library(tmp_path_factory.mktemp("compiled"), compiler))


@pytest.fixture(scope="module")
def deepspeed() -> DeepSpeedKernel:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return DeepSpeedKernel()


@pytest.fixture(params=["torch", "compiled", "deepspeed"])
def kernel(request: pytest.FixtureRequest) -> HostKernel:
    return TorchKernel() if request.param == "torch" else request.getfixturevalue(request.param)


def start(size: int, dtype: torch.dtype = FP32, moments: torch.dtype | None = None) -> State:
    master = torch.randn(size, dtype=FP64).to(dtype)
    kept = moments or dtype
    return State(master, torch.zeros(size, dtype=kept), torch.zeros(size, dtype=kept))


def gradients(size: int, count: int = 4) -> Iterator[tuple[int, Tensor]]:
    """Random ones of several magnitudes, in bf16 so that they are exact in every dtype."""
    for number in range(1, count + 1):
        yield number, (torch.randn(size) * 10.0 ** torch.randint(-4, 2, (size,))).to(BF16)


def optimizer(parameter: Tensor, step: AdamWStep, fused: bool) -> torch.optim.AdamW:
    betas = (step.beta1, step.beta2)
    decay = step.weight_decay
    return torch.optim.AdamW(
        [parameter], step.lr, betas, step.eps, decay, fused=fused, foreach=False
    )


def apply(
    kernel: HostKernel, state: State, grad: Tensor, weight: Tensor | None, step: AdamWStep
) -> None:
    kernel(state.master, grad, state.exp_avg, state.exp_avg_sq, weight, step)


def assert_close(actual: Tensor, expected: Tensor, of: Tensor, relative: float = 1e-6) -> None:
    """Asserts that they differ by at most a fraction `relative` of the magnitudes `of`."""
    assert ((actual.double() - expected).abs() <= relative * of.abs()).all()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("size", SIZES)
def test_torch_kernel_has_the_bits_of_the_fused_optimizer(
    size: int, dtype: torch.dtype, name: str
) -> None:
    torch.set_num_threads(2)
    state, step = start(size, dtype), STEPS[name]
    parameter = torch.nn.Parameter(state.master.clone())
    reference = optimizer(parameter, step, fused=True)
    for number, grad in gradients(size):
        parameter.grad = grad.to(dtype).mul_(step.scale)
        reference.step()
        weight = torch.empty(size, dtype=BF16)
        apply(TorchKernel(), state, grad.to(dtype), weight, replace(step, step=number))
        kept = reference.state[parameter]
        expected = (parameter.detach(), kept["exp_avg"], kept["exp_avg_sq"])
        assert all(map(torch.equal, state, expected))
        assert torch.equal(weight, parameter.detach().to(BF16))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("size", SIZES)
def test_fp32_against_fp64(kernel: HostKernel, size: int, name: str) -> None:
    torch.set_num_threads(2)
    state, step = start(size), STEPS[name]
    parameter = torch.nn.Parameter(state.master.double())
    reference = optimizer(parameter, step, fused=False)
    largest = torch.zeros(size, dtype=FP64)  # gradient of every element, until now
    for number, grad in gradients(size):
        parameter.grad = grad.double() * step.scale
        largest = torch.maximum(largest, parameter.grad.abs())
        reference.step()
        weight = torch.full((size,), math.nan, dtype=BF16)
        apply(kernel, state, grad.float(), weight, replace(step, step=number))
        kept = reference.state[parameter]
        master = parameter.detach()
        assert_close(state.master, master, of=master.abs().clamp(min=1))  # from which it began
        assert_close(state.exp_avg, kept["exp_avg"], of=largest)
        assert_close(state.exp_avg_sq, kept["exp_avg_sq"], of=kept["exp_avg_sq"])
        assert torch.equal(weight, state.master.to(BF16))


@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("grads", [FP32, BF16])
def test_bf16_moments_and_gradients(
    kernel: HostKernel, grads: torch.dtype, moments: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every update against fp64 from the same state; bf16 moments to their last digit."""
    monkeypatch.setattr(host_adamw, "SLICE", 100)
    size = 1000
    state = start(size, moments=moments)
    for number, grad in gradients(size):
        before = state.to(FP64)
        parameter = torch.nn.Parameter(before.master)
        reference = optimizer(parameter, USUAL, fused=False)
        reference.state[parameter] = {
            "step": torch.tensor(number - 1.0),
            "exp_avg": before.exp_avg,
            "exp_avg_sq": before.exp_avg_sq,
        }
        parameter.grad = grad.double() * USUAL.scale
        reference.step()
        apply(kernel, state, grad.to(grads), None, replace(USUAL, step=number))
        master = parameter.detach()
        assert_close(state.master, master, of=master.abs().clamp(min=1))  # from which it began
        digits = 1e-6 if moments == FP32 else 2.0**-8
        largest = torch.maximum(parameter.grad.abs(), before.exp_avg.abs())
        assert_close(state.exp_avg, before.exp_avg, largest, digits)
        assert_close(state.exp_avg_sq, before.exp_avg_sq, before.exp_avg_sq, digits)


@pytest.mark.parametrize("written", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_the_weight_is_the_master_rounded(
    kernel: HostKernel, dtype: torch.dtype, written: torch.dtype
) -> None:
    """Without an update: every sign and exponent, ties among them, and NaN."""
    high = torch.arange(2**16).repeat_interleave(4)
    low = torch.tensor([0, 0x7FFF, 0x8000, 0x8001]).repeat(2**16)
    values = (high << 16 | low).to(torch.int32).view(FP32)
    master = values[~values.isinf()].to(dtype)
    state = State(master.clone(), torch.zeros_like(master), torch.zeros_like(master))
    weight = torch.empty(master.shape, dtype=written)
    step = replace(USUAL, lr=0.0)
    apply(kernel, state, torch.ones_like(master), weight, step)
    torch.testing.assert_close(state.master, master, rtol=0, atol=0, equal_nan=True)
    expected = state.master.to(written)  # DeepSpeed's -0 becomes 0
    assert torch.equal(weight.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(weight[numbers], expected[numbers])
    assert torch.equal(weight.signbit()[numbers], expected.signbit()[numbers])


@pytest.mark.parametrize("offset", [0, 1, 32])
@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("written", [BF16, FP32, None])
def test_any_cut_has_the_same_bits(
    compiled: CompiledKernel,
    moments: torch.dtype,
    written: torch.dtype | None,
    offset: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads, pieces, and a weight that begins within a cache line."""
    monkeypatch.setattr(host_adamw, "ONE_THREAD", 0)
    size = 5000
    began, grads = start(size, moments=moments), [grad for _, grad in gradients(size)]

    def run(threads: int, edges: list[int]) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        state = State(*(t.clone() for t in began))
        weight = None if written is None else torch.zeros(offset + size, dtype=written)[offset:]
        for number, grad in enumerate(grads, 1):
            for left, right in zip([0, *edges], [*edges, size], strict=True):
                part = State(*(t[left:right] for t in state))
                target = None if weight is None else weight[left:right]
                apply(compiled, part, grad[left:right], target, replace(USUAL, step=number))
        return (*state, *(() if weight is None else (weight,)))

    whole = run(1, [])
    for threads, edges in [(2, []), (3, []), (100, []), (1, [1, 63, 64, 200, 4999]), (2, [2001])]:
        assert all(map(torch.equal, run(threads, edges), whole))


@pytest.mark.parametrize("moments", [FP32, BF16])
def test_other_instructions_have_the_same_bits(
    compiled: CompiledKernel, moments: torch.dtype, tmp_path: Path
) -> None:
    """Scalar ones, of code that is not optimised."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {cpp_compiler()} "$@" -O0\n')
    compiler.chmod(0o755)
    scalar = CompiledKernel(compile_library(tmp_path, str(compiler)))
    states = [start(5000, moments=moments)]
    states.append(State(*(t.clone() for t in states[0])))
    for number, grad in gradients(5000):
        for kernel, state in zip((compiled, scalar), states, strict=True):
            apply(kernel, state, grad.clone(), None, replace(USUAL, step=number))
    assert all(map(torch.equal, *states))


def test_shares_cover_all_elements() -> None:
    for count in (0, 1, 64, 65, 1000, 4096):
        for threads in (1, 2, 3, 64):
            cuts = list(shares(count, threads))
            assert len(cuts) <= threads
            assert [i for left, right in cuts for i in range(left, right)] == list(range(count))
            assert all(left % 64 == 0 for left, _ in cuts)


@pytest.mark.parametrize("grads", [FP32, BF16])
def test_infinite_gradients_propagate_as_in_torch(kernel: HostKernel, grads: torch.dtype) -> None:
    """And what they leave in the moments, in two more steps."""
    if kernel.name == "deepspeed":
        pytest.skip("DeepSpeed keeps infinite moments, where torch makes them NaN")
    size = 200
    state, expected = start(size), start(size)
    expected.master.copy_(state.master)
    for number, grad in gradients(size, 3):
        if number == 1:
            grad[3::40], grad[7::40], grad[70::41] = math.inf, -math.inf, math.nan
        weight, other = torch.empty(size, dtype=BF16), torch.empty(size, dtype=BF16)
        step = replace(USUAL, step=number)
        apply(kernel, state, grad.to(grads), weight, step)
        apply(TorchKernel(), expected, grad.to(FP32), other, step)
        for actual, wanted in zip((*state, weight), (*expected, other), strict=True):
            assert_same_kind(actual, wanted)
        assert 10 < state.master.isnan().sum() < 20


def assert_same_kind(actual: Tensor, wanted: Tensor) -> None:
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert torch.equal(actual.isposinf(), wanted.isposinf())
    assert torch.equal(actual.isneginf(), wanted.isneginf())


@pytest.mark.parametrize(
    ("dtype", "moments", "written"), [(FP64, FP64, BF16), (FP64, BF16, FP64), (FP32, FP32, FP16)]
)
def test_the_compiled_kernel_passes_on_what_it_does_not_serve(
    compiled: CompiledKernel, dtype: torch.dtype, moments: torch.dtype, written: torch.dtype
) -> None:
    ours, theirs = start(100, dtype, moments), start(100, dtype, moments)
    theirs.master.copy_(ours.master)
    (grad,) = (grad for _, grad in gradients(100, 1))
    weights = [torch.empty(100, dtype=written) for _ in range(2)]
    apply(compiled, ours, grad.clone(), weights[0], USUAL)
    apply(TorchKernel(), theirs, grad, weights[1], USUAL)
    assert all(map(torch.equal, (*ours, weights[0]), (*theirs, weights[1])))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad": torch.zeros(3)}, "grad has 3 elements, master has 4"),
        ({"grad": torch.zeros(8)[::2]}, "grad is not a contiguous tensor"),
        ({"master": torch.zeros(4, device="meta")}, "master is not a contiguous tensor in host"),
        ({"master": torch.zeros(4, dtype=BF16)}, "master is in torch.bfloat16"),
        ({"grad": torch.zeros(4, dtype=FP64)}, "grad is in torch.float64"),
        (
            {"exp_avg": torch.zeros(4, dtype=BF16)},
            "moments are in torch.bfloat16 and torch.float32",
        ),
        ({"weight": torch.zeros(4, dtype=torch.int32)}, "weight is in torch.int32"),
    ],
)
def test_other_tensors_are_refused(
    kernel: HostKernel, changed: dict[str, Tensor], message: str
) -> None:
    names = ("master", "grad", "exp_avg", "exp_avg_sq", "weight")
    tensors = {name: torch.zeros(4) for name in names} | changed
    with pytest.raises(ValueError, match=message):
        kernel(**tensors, step=USUAL)


def test_tensors_without_memory_are_refused(compiled: CompiledKernel) -> None:
    """Behind whose pointers nothing is."""
    with FakeTensorMode():
        tensors = [torch.zeros(4) for _ in range(4)]
        with pytest.raises(ValueError, match="master is a FakeTensor: take a plain tensor"):
            compiled(*tensors, None, step=USUAL)
        TorchKernel()(*tensors, None, step=USUAL)


def test_updates_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        replace(USUAL, step=0)


def test_a_library_that_is_none_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(OSError, match=r"text\.so"):
        CompiledKernel(tmp_path / "text.so")
