"""Hugging Face models as oracles: computed in fp64, with tensors converted to native names.

with fp64(): hf_model = LlamaForCausalLM(config)
assert_same_function(hf_model, seed=1)
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
from torch.utils._pytree import tree_leaves

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Family, from_hf, to_hf
from colonnade.launcher.convert.huggingface.folder import TOKENS
from colonnade.launcher.weights.logits import Lifted
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder

# transformers uses these packages if they are installed, and they cannot run fp64 on a CPU, so they
# are hidden from the test process. Import this file before transformers.
for name in ("mamba_ssm", "causal_conv1d", "fla"):
    sys.modules[name] = None  # type: ignore[assignment]


class _Lifted(Lifted):
    """Turns every cast to fp32 into one to fp64; any fp32 result that remains is an error."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                assert leaf.dtype != torch.float32, f"{func} made fp32 in an fp64 oracle"
        return result


@contextmanager
def fp64() -> Iterator[None]:
    """Makes a transformers model that is built and run inside compute in fp64 throughout.

    Its modules cast rotary angles, norms, softmax and router to fp32 whatever their parameters'
    dtype, which would cause errors of 1e-7. Backward needs no such cast: autograd keeps dtypes.
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
    """Draws weights under which every parameter matters.

    Norms and D differ from 1 and biases from 0; decays are slow enough for a state to last many
    tokens. Biases of routers are state, not parameters, and random as well.
    """
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
        options: the tested options, in words.
        oracle: name of the model that it is compared with.
        build: returns the oracle, built inside `fp64()`.
    """

    name: str
    symbols: str
    options: str
    oracle: str
    build: Callable[[], Any]

    def __str__(self) -> str:
        """Returns the id of the test."""
        return self.name


def family(hf_model: nn.Module) -> Family:
    """Returns the family of a transformers model."""
    return family_of(type(hf_model).__name__)


def native_config(hf_model: Any) -> ModelConfig:
    """Returns the native config of a transformers model, without multi-token prediction."""
    config = family(hf_model).config_from_hf(hf_model.config.to_dict())
    return config.model_copy(update={"mtp": 0})


def in_native_names(
    values: Mapping[str, Tensor], config: ModelConfig, hf_model: nn.Module, state: bool = False
) -> dict[str, Tensor]:
    """Converts parameters or gradients of a transformers model (with `state`, its state_dict)."""
    return from_hf(family(hf_model), config, values, state=state)


def empty(config: ModelConfig) -> Decoder:
    """Returns an fp64 decoder with uninitialised weights; its loss has chunks of 7 tokens."""
    with torch.device("meta"):
        model = Decoder(config, loss_chunk=7)
    return model.to(torch.float64).to_empty(device="cpu")


def decoder(config: ModelConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """Returns an fp64 decoder with these weights."""
    model = empty(config)
    model.load_state_dict(dict(weights))  # strict: raises unless names and shapes agree
    return model


def with_random_weights(config: ModelConfig, hf_model: Any, seed: int) -> Decoder:
    """Draws random weights for a transformers model; returns a decoder with the same weights."""
    randomise(hf_model, seed)
    return decoder(config, in_native_names(hf_model.state_dict(), config, hf_model, state=True))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradient of every parameter by name; fails if one has none."""
    named = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        named[name] = p.grad
    return named


S, B = 41, 4  # shape of the data that `data` returns


def data(vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns random tokens and labels, `[S, B]`; a fifth of the labels have no loss."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(vocab, (2, S, B), generator=g)
    return tokens, labels.where(torch.rand(S, B, generator=g) > 0.2, -100)


def one_document_per_row(groups: float = 1.0) -> Context:
    """Returns a context in which every row is one document."""
    return Context(torch.arange(S)[:, None].expand(S, B), groups=groups)


def run_hf(hf_model: Any, tokens: Tensor) -> Any:
    """Runs a transformers model in fp64 on tokens `[S, B]`, which it takes as `[B, S]`."""
    with fp64():
        return hf_model(tokens.T)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross entropy over valid labels, of `[B, S, V]` logits."""
    return F.cross_entropy(logits.flatten(0, 1), labels.T.flatten(), ignore_index=-100)


def assert_same_function(hf_model: Any, seed: int) -> None:
    """Checks that the converted model has the same logits, loss and gradients."""
    config = native_config(hf_model)
    native = with_random_weights(config, hf_model, seed)
    tokens, labels = data(config.vocab, seed)

    logits = run_hf(hf_model, tokens).logits
    with torch.no_grad():
        actual = {"logits": native(tokens, one_document_per_row())}
    assert_equal(actual, {"logits": logits.detach().transpose(0, 1)})

    loss = mean_loss(logits, labels)
    loss.backward()
    native_loss = native(tokens, one_document_per_row(), labels)[0] / (labels != -100).sum()
    native_loss.backward()
    assert_equal({"loss": native_loss.detach()}, {"loss": loss.detach()})
    assert_equal(gradients(native), in_native_names(gradients(hf_model), config, hf_model))


def assert_config_round_trip(hf_model: Any) -> None:
    """Checks that native code and transformers read a written config as the same model."""
    config = native_config(hf_model)
    written = json.loads(json.dumps(family(hf_model).config_to_hf(config)))
    written |= dict.fromkeys(TOKENS)  # as `write_config` has them, where no source names others
    assert family(hf_model).config_from_hf(written) == config
    written = dict.fromkeys(TOKENS) | written  # as in a folder

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with fp64():
        rebuilt = type(hf_model)(type(hf_model.config).from_dict(written, **eager))
        rebuilt.load_state_dict(hf_model.state_dict())  # the same names and shapes
    tokens, _ = data(config.vocab, seed=0)
    with torch.no_grad():
        logits = [{"logits": run_hf(model, tokens).logits} for model in (rebuilt, hf_model)]
    assert_equal(*logits)


def assert_weight_round_trips(hf_model: Any, dtype: torch.dtype) -> None:
    """Checks that weights survive conversion from Hugging Face and back bit for bit.

    Both with tensors as in transformers' memory and as in a checkpoint.
    """
    config, table = native_config(hf_model), family(hf_model)
    weights = {name: t.to(dtype) for name, t in hf_model.state_dict().items()}
    weights = {n: t for n, t in weights.items() if n not in table.copies(config)}
    native = from_hf(table, config, weights)
    for packed, expected in ((True, weights), (False, None)):
        back = to_hf(table, config, native, packed=packed)
        assert expected is None or _same_bits(back, expected)
        assert _same_bits(from_hf(table, config, back), native)


def _same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b
    )
