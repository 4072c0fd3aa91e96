"""Hugging Face's models as oracles: all their arithmetic in fp64, their tensors under our names.

with fp64(): theirs = LlamaForCausalLM(config)
assert_same_function(theirs, seed=1)
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from equal import assert_equal
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Family, to_ours, to_theirs
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder

# transformers takes these wherever they are installed, and they cannot run fp64 on a CPU: the test
# process does not see them. Import this file before transformers.
for name in ("mamba_ssm", "causal_conv1d", "fla"):
    sys.modules[name] = None  # type: ignore[assignment]


class _Lifted(TorchFunctionMode):
    """Every cast to fp32 becomes one to fp64; an fp32 result that still appears is an error."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(
            lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                assert leaf.dtype != torch.float32, f"{func} made fp32 in an fp64 oracle"
        return result


@contextmanager
def fp64() -> Iterator[None]:
    """Build and run a transformers model inside this: it computes in fp64 throughout.

    Its modules cast rotary angles, norms, softmax and router to fp32 whatever their parameters'
    dtype, which would leave errors of 1e-7. Backward passes need no cover: autograd keeps dtypes.
    """
    assert not torch.is_autocast_enabled("cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lifted():
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Weights with which no parameter hides: norms and D off 1, biases off 0, decays slow enough
    that a state is carried over many tokens. Biases of routers are state, and random as well."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("A_log") or name.endswith("dt_bias"):
            p.uniform_(-3.0, 0.0, generator=generator)
        elif p.dim() == 1:
            p.normal_(1.0, 0.3, generator=generator)
        else:
            p.normal_(0.0, 1.5 * p.shape[-1] ** -0.5, generator=generator)
    for name, state in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "router_bias")):
            state.normal_(0.0, 0.1, generator=generator)


@dataclass(frozen=True)
class Case:
    """A row of the README's table, and of a parametrised test.

    Attributes:
        name: of the test.
        symbols: of the pattern.
        options: what is switched on, in words.
        oracle: what it is compared with.
        build: makes the oracle, inside of `fp64()`.
    """

    name: str
    symbols: str
    options: str
    oracle: str
    build: Callable[[], Any]

    def __str__(self) -> str:
        """The test's id."""
        return self.name


def family(theirs: nn.Module) -> Family:
    """The map of this transformers model."""
    return family_of(type(theirs).__name__)


def our_config(theirs: Any) -> ModelConfig:
    """Our config of this transformers model, which has no modules for further tokens."""
    config = family(theirs).config_from(theirs.config.to_dict())
    return config.model_copy(update={"mtp": 0})


def in_our_names(
    values: Mapping[str, Tensor], config: ModelConfig, theirs: nn.Module, state: bool = False
) -> dict[str, Tensor]:
    """Parameters or gradients of `theirs` (with `state`, its state_dict) as our decoder's."""
    return to_ours(family(theirs), config, values, state=state)


def empty(config: ModelConfig) -> Decoder:
    """Our model in fp64, its weights yet to be filled; computes its loss seven tokens at a time."""
    with torch.device("meta"):
        model = Decoder(config, loss_chunk=7)
    return model.to(torch.float64).to_empty(device="cpu")


def decoder(config: ModelConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """Our model in fp64 with these weights."""
    model = empty(config)
    model.load_state_dict(dict(weights))  # strict: names and shapes agree, or it raises
    return model


def copied(config: ModelConfig, theirs: Any, seed: int) -> Decoder:
    """Random weights for theirs; ours with the same."""
    randomise(theirs, seed)
    return decoder(config, in_our_names(theirs.state_dict(), config, theirs, state=True))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, by name; one that has none is an error."""
    named = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        named[name] = p.grad
    return named


S, B = 41, 4  # of the data below


def data(vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, `[S, B]`, a fifth of the labels without loss."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(vocab, (2, S, B), generator=g)
    return tokens, labels.where(torch.rand(S, B, generator=g) > 0.2, -100)


def whole_rows(groups: float = 1.0) -> Context:
    """Every row is one document."""
    return Context(torch.arange(S)[:, None].expand(S, B), groups=groups)


def run_theirs(theirs: Any, tokens: Tensor) -> Any:
    """Their output, over `[B, S]` as they have it."""
    with fp64():
        return theirs(tokens.T)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over valid labels, of their `[B, S, V]` logits."""
    return F.cross_entropy(logits.flatten(0, 1), labels.T.flatten(), ignore_index=-100)


def assert_same_function(theirs: Any, seed: int) -> None:
    """Ours, by its maps, has the logits, the loss and all gradients of `theirs`."""
    config = our_config(theirs)
    ours = copied(config, theirs, seed)
    tokens, labels = data(config.vocab, seed)

    logits = run_theirs(theirs, tokens).logits
    with torch.no_grad():
        mine = {"logits": ours(tokens, whole_rows())}
    assert_equal(mine, {"logits": logits.detach().transpose(0, 1)})

    loss = mean_loss(logits, labels)
    loss.backward()
    my_loss = ours(tokens, whole_rows(), labels)[0] / (labels != -100).sum()
    my_loss.backward()
    assert_equal({"loss": my_loss.detach()}, {"loss": loss.detach()})
    assert_equal(gradients(ours), in_our_names(gradients(theirs), config, theirs))


def assert_config_round_trip(theirs: Any) -> None:
    """Our config written as theirs is read as the same model, by us and by transformers."""
    config = our_config(theirs)
    written = json.loads(json.dumps(family(theirs).config_to(config)))
    assert family(theirs).config_from(written) == config

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with fp64():
        again = type(theirs)(type(theirs.config).from_dict(written, **eager))
        again.load_state_dict(theirs.state_dict())  # the same names and shapes
    tokens, _ = data(config.vocab, seed=0)
    with torch.no_grad():
        logits = [{"logits": run_theirs(model, tokens).logits} for model in (again, theirs)]
    assert_equal(*logits)


def assert_weight_round_trips(theirs: Any, dtype: torch.dtype) -> None:
    """Theirs to ours and back, as in memory and as in a checkpoint, gives the same bits."""
    config, table = our_config(theirs), family(theirs)
    weights = {name: t.to(dtype) for name, t in theirs.state_dict().items()}
    weights = {n: t for n, t in weights.items() if n not in table.copies(config)}
    ours = to_ours(table, config, weights)
    for packed, expected in ((True, weights), (False, None)):
        back = to_theirs(table, config, ours, packed=packed)
        assert expected is None or _same_bits(back, expected)
        assert _same_bits(to_ours(table, config, back), ours)


def _same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b
    )
