"""The chunked delta rule against the token-by-token recurrence, and both against transformers'."""

from collections.abc import Callable
from itertools import pairwise

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from scans import packed, results
from shown import Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from colonnade.kernels.delta import delta_rule, delta_rule_recurrence

TABLE = [
    Row("D", "chunks; packed documents; states in and out", "token recurrence"),
    Row("G", "chunks; packed documents; states in and out", "token recurrence"),
]

ROWS = ("q", "k", "v", "beta", "decay")


def inputs(
    S: int,
    B: int = 2,
    H: int = 4,
    K: int = 2,
    P: int = 5,
    V: int = 3,
    seed: int = 0,
    gated: bool = True,
) -> dict[str, Tensor]:
    """Random fp64 arguments of delta_rule, beta between 0 and 2."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    t = {
        "q": F.normalize(normal(S, B, K, P), dim=-1) * P**-0.5,
        "k": F.normalize(normal(S, B, K, P), dim=-1),
        "v": normal(S, B, H, V),
        "beta": 2 * normal(S, B, H).sigmoid(),
        "initial_state": normal(B, H, P, V),
    }
    return t | {"decay": F.logsigmoid(normal(S, B, H) + 2)} if gated else t


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize(
    ("S", "chunk"), [(64, 16), (37, 8), (75, 37), (5, 64), (1, 4), (23, 1), (70, 128)]
)
def test_equals_recurrence(S: int, chunk: int, documents: int, gated: bool) -> None:
    t = inputs(S, gated=gated)
    ids = packed(S, 2, documents) if documents else None
    expected = results(delta_rule_recurrence, t, documents=ids)
    assert_equal(results(delta_rule, t, chunk=chunk, documents=ids), expected, of_all=0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("K", [1, 4])
def test_key_heads_without_initial_state(K: int, gated: bool) -> None:
    t = inputs(21, K=K, gated=gated)
    del t["initial_state"]
    assert_equal(results(delta_rule, t, chunk=8), results(delta_rule_recurrence, t), of_all=0)


@pytest.mark.parametrize("chunked", [False, True])
def test_equals_transformers(chunked: bool) -> None:
    """Qwen3-Next's gated delta rule, which scales q itself and puts the batch first."""
    t = inputs(37)
    scale = t["q"].shape[-1] ** -0.5

    def theirs(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        first = [x.transpose(0, 1) for x in (q / scale, k, v, decay, beta)]
        options = {"initial_state": initial_state, "output_final_state": True}
        with oracle.fp64():
            if chunked:
                o, s = qwen3_next.torch_chunk_gated_delta_rule(*first, chunk_size=16, **options)
            else:
                o, s = qwen3_next.torch_recurrent_gated_delta_rule(*first, **options)
        return o.transpose(0, 1), s

    expected = results(theirs, t)
    ours = results(delta_rule, t, chunk=8) if chunked else results(delta_rule_recurrence, t)
    assert_equal(ours, expected, of_all=0)


@pytest.mark.parametrize("gated", [True, False])
def test_packed_documents_equal_separate_ones(gated: bool) -> None:
    """Outputs are those of each document by itself, the first with the initial state."""
    t, bounds = inputs(40, B=1, gated=gated), [0, 3, 16, 17, 40]
    ids = torch.zeros(40, 1, dtype=torch.int32)
    for start in bounds[1:-1]:
        ids[start:] += 2
    o, state = delta_rule(**t, chunk=8, documents=ids)
    for start, stop in pairwise(bounds):
        separate = {k: v[start:stop] if k in ROWS else v for k, v in t.items()}
        if start:
            del separate["initial_state"]
        expected_o, expected_state = delta_rule_recurrence(**separate)
        assert_equal({"o": o[start:stop]}, {"o": expected_o}, of_all=0)
    assert_equal({"state": state}, {"state": expected_state}, of_all=0)


@pytest.mark.parametrize("gated", [True, False])
def test_chained_halves_equal_one_call(gated: bool) -> None:
    t, ids, middle = inputs(33, gated=gated), packed(33, 2, 3), 18

    def halves(initial_state: Tensor, **rows: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = [], initial_state
        for tokens in (slice(None, middle), slice(middle, None)):
            # The second half's initial state belongs to its first token's document: pass it only
            # where the first half's last token is of that document.
            if tokens.start:
                state = state * (ids[middle] == ids[middle - 1])[:, None, None, None]
            half = {name: v[tokens] for name, v in rows.items()}
            o, state = delta_rule(**half, chunk=8, documents=ids[tokens], initial_state=state)
            outputs.append(o)
        return torch.cat(outputs), state

    assert_equal(results(halves, t), results(delta_rule, t, chunk=8, documents=ids), of_all=0)


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(gated: bool) -> None:
    t = inputs(5, B=1, H=2, K=1, P=2, V=2, gated=gated)
    ids = torch.tensor([0, 0, 0, 7, 7], dtype=torch.int32)[:, None]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule(**dict(zip(t, values, strict=True)), chunk=2, documents=ids)

    assert torch.autograd.gradcheck(function, tuple(v.requires_grad_() for v in t.values()))


@pytest.mark.parametrize("gated", [True, False])
def test_under_checkpoint(gated: bool) -> None:
    t = inputs(19, gated=gated)

    def recomputed(**t: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(delta_rule, **t, chunk=8, use_reentrant=False)

    assert_equal(results(recomputed, t), results(delta_rule, t, chunk=8), relative=0, of_all=0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_over_10000_tokens(dtype: torch.dtype, gated: bool) -> None:
    """Against fp64 of the same rounded inputs: the errors are those of the kernel only.

    No step expands the state (keys of norm 1 or less, 0 <= beta <= 2), so that one token's rounding
    error does not grow, and the errors of S tokens in fp32 are at most S · 2⁻²⁴ of the largest
    value; gradients go through two such chains. Every result is rounded to its dtype once.
    """
    S = 10_000
    t, ids = inputs(S, B=1, H=2, K=1, P=8, V=4, gated=gated), packed(S, 1, 2)
    t["k"] *= 1 - 2**-7  # so that rounding leaves no norm above 1
    wide = ("beta", "decay", "initial_state")
    narrow = {k: v.to(torch.float32 if k in wide else dtype) for k, v in t.items()}
    got = results(delta_rule, narrow, chunk=64, documents=ids)
    assert got["y"].dtype == dtype
    assert got["state"].dtype == torch.float32
    assert all(got[f"d{k}"].dtype == v.dtype for k, v in narrow.items())
    exact = {k: v.double() for k, v in narrow.items()}
    expected = results(delta_rule, exact, chunk=16, documents=ids)
    with torch.no_grad():
        o, state = delta_rule_recurrence(**exact, documents=ids)
    for name, truth in {**expected, "y": o, "state": state}.items():
        unit = torch.finfo(got[name].dtype).eps / 2
        chains = 2 if name.startswith("d") else 1
        bound = unit * truth.abs() + chains * S * 2**-24 * truth.abs().max()
        assert ((got[name] - truth).abs() <= bound).all(), name


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("keys", ["random", "alike", "repeated"])
def test_fp32_keys_round_as_the_recurrence_does(keys: str, gated: bool) -> None:
    """In fp32 the errors of short chunks are about those of the token recurrence, beta up to 2.

    Errors against fp64, relative to the largest element: over 512 tokens those of chunks of 2 and 4
    were at most 3.4 times the recurrence's.
    """
    t = inputs(96, P=4, V=4, gated=gated)
    if keys == "alike":
        t["k"] = F.normalize(t["k"][:1] + 0.01 * t["k"], dim=-1)
    elif keys == "repeated":
        t["k"] = t["k"][:3].repeat(32, 1, 1, 1)
    narrow = {name: v.float() for name, v in t.items()}
    truth = results(delta_rule_recurrence, {name: v.double() for name, v in narrow.items()})

    def errors(got: dict[str, Tensor]) -> dict[str, float]:
        return {n: float((got[n] - b).abs().max() / b.abs().max()) for n, b in truth.items()}

    plain = errors(results(delta_rule_recurrence, narrow))
    for chunk in (2, 4):
        for name, error in errors(results(delta_rule, narrow, chunk=chunk)).items():
            assert error <= 6 * max(plain[name], 2**-24), (chunk, name)


def test_fp32_decays_late_in_a_chunk() -> None:
    """Between adjacent tokens late in a chunk, decays are small differences of large sums."""
    t = {k: v.float() for k, v in inputs(256).items()}
    t["decay"] = torch.full_like(t["decay"], -0.6)
    t["decay"][..., 1] = -4.8
    t["decay"][5] = -1e6  # and one that decays the state to zero
    expected = delta_rule_recurrence(**{k: v.double() for k, v in t.items()})[0][6:]
    o = delta_rule(**t, chunk=256)[0][6:]
    assert_equal({"o": o}, {"o": expected}, relative=2e-6, of_all=0)


def test_fp64_decays_behind_a_strong_one() -> None:
    """They are not differences of sums that include the strong one: as precise as the recurrence.

    A strong decay makes the initial state's gradient tiny, so it is left out.
    """
    t = inputs(64)
    t["decay"] = t["decay"] * 0.1
    t["decay"][::7] = -500.0
    del t["initial_state"]
    got, expected = results(delta_rule, t, chunk=64), results(delta_rule_recurrence, t)
    assert_equal(got, expected, relative=2e-14, of_all=0)


def test_fp32_gradient_of_strong_decays() -> None:
    """It is tiny against the terms of a token with itself, which cancel, so must not be summed."""
    t = {k: v.float() for k, v in inputs(32).items()}
    t["decay"] = torch.full_like(t["decay"], -20.0)
    expected = results(delta_rule_recurrence, {k: v.double() for k, v in t.items()})["ddecay"]
    got = results(delta_rule, t, chunk=8)["ddecay"]
    assert_equal({"ddecay": got}, {"ddecay": expected}, relative=1e-5, of_all=0)


def test_fp32_gradient_of_endless_decay_is_zero() -> None:
    """Where the state decays to zero, the size of the log-decay does not matter."""
    t = {k: v.float() for k, v in inputs(32).items()}
    t["decay"][5], t["decay"][17] = -1e10, -torch.inf
    assert not results(delta_rule, t, chunk=8)["ddecay"][[5, 17]].any()


EXTREMES = {
    "beta 0": {"beta": 0.0},
    "beta 1": {"beta": 1.0},
    "beta 2": {"beta": 2.0},
    "no decay": {"decay": 0.0},
    "weak decay": {"decay": -1e-30},
    "strong decay": {"decay": -1e10},
    "endless decay": {"decay": -torch.inf},
    "zero keys": {"k": 0.0},
    "one key, reflected": {"k": 5**-0.5, "beta": 2.0, "decay": 0.0},
    "one key, replaced": {"k": 5**-0.5, "beta": 1.0},
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_inputs_are_finite_and_right(extreme: str, dtype: torch.dtype, every: int) -> None:
    t = inputs(70)
    for name, value in EXTREMES[extreme].items():
        t[name][::every] = value
    t = {k: v.to(dtype) for k, v in t.items()}
    got = results(delta_rule, t, chunk=64)
    expected = results(delta_rule_recurrence, {k: v.double() for k, v in t.items()})
    assert_equal(got, expected, relative=1e-9 if dtype == torch.float64 else 1e-4, of_all=0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values_are_finite(dtype: torch.dtype, gated: bool) -> None:
    relative = 1e-9 if dtype == torch.float64 else 1e-4
    t = {k: v.to(dtype) for k, v in inputs(9, gated=gated).items()}
    zeros = {k: torch.zeros_like(v) for k, v in t.items()}
    t["v"][4, 0, 1, 2] = 1e30
    for case in (zeros, t):
        expected = results(delta_rule_recurrence, case)
        assert_equal(results(delta_rule, case, chunk=4), expected, relative=relative, of_all=0)


class _Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operator returns."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out)]
        self.bytes = max(self.bytes, *sizes)
        return out


def test_memory_is_linear() -> None:
    """Backward saves the inputs and one state per chunk; no tensor is quadratic in S."""
    saved, largest = {}, {}
    for n in (4, 16):
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        t = inputs(8 * n)
        input_bytes = sum(v.nbytes for k, v in t.items() if k in ROWS)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            _Largest() as largest_tensor,
        ):
            results(delta_rule, t, chunk=8)
        saved[n], largest[n] = sum(storages.values()) - input_bytes, largest_tensor.bytes
        assert saved[n] == (n + 1) * t["initial_state"].nbytes
    assert largest[16] <= 4 * largest[4]


def test_any_strides() -> None:
    """Batch-first memory, as a transposed view."""
    t = inputs(19)
    views = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if k in ROWS else v for k, v in t.items()
    }
    assert_equal(
        results(delta_rule, views, chunk=8),
        results(delta_rule, t, chunk=8),
        relative=1e-13,
        of_all=0,
    )


def test_bad_shapes() -> None:
    t = inputs(4, H=4, K=3)
    with pytest.raises(ValueError, match="4 value heads, 3 key heads"):
        delta_rule(**t, chunk=2)
    with pytest.raises(ValueError, match="chunks of 0"):
        delta_rule(**inputs(4), chunk=0)
