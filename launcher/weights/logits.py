"""Compares the logits of weights that were written with those of their source, in fp64.

The source computes with its tensors rounded as they were written, so that nothing but fp64's own
rounding is left, whatever the dtypes: a bound far below one field or one tensor that is wrong.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from colonnade.launcher.weights.fold import Folded
from colonnade.launcher.weights.peer import without_gpu_packages
from colonnade.launcher.weights.source import Weights
from colonnade.launcher.weights.target import Target
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.names import tensors_of

COMPARED = 4 * 10**8  # parameters of the largest model that is compared: 3.2 GB in fp64
BOUND = 2**22 * torch.finfo(torch.float64).eps  # 1e-9, of the largest logit
LENGTH, ROWS = 64, 2
Compute = Callable[[Tensor], Tensor]  # tokens `[S, B]` to logits `[S, B, V]`


class LogitsDifferError(Exception):
    """What was written computes something else than its source: a fault of the conversion."""


class NotComparedError(Exception):
    """Logits cannot be computed here; the message says why."""


def compare(
    source: Weights,
    target: Target,
    dtype: torch.dtype | None,
    folder: Path,
    report: Callable[[str], object],
) -> float | None:
    """Compares what a folder computes with its source; returns the largest difference, or None,
    with a line that says why, where logits are not compared.

    Where σReparam was folded, its model is compared with the plain one too.

    Args:
        source: that was converted.
        target: its format.
        dtype: in which it was written; None: that of each tensor.
        folder: that was written.
        report: is called with the line.

    Raises:
        LogitsDifferError: the difference is above the bound.
    """
    size, vocab = sum(shape.numel() for shape in source.shapes.values()), source.config.vocab
    if size > COMPARED:
        report(f"logits were not compared: {size:,} parameters, and up to {COMPARED:,} are")
        return None
    length = min(LENGTH, source.config.learned_positions or LENGTH)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (length, ROWS), generator=generator)
    expected = partial(of_decoder, target.weights, target.dtypes(dtype))
    try:
        found = difference(expected, partial(target.logits, folder), tokens, str(folder))
    except NotComparedError as reason:
        report(f"logits were not compared: {reason}")
        return None
    if source.config.sigma_reparam and not target.weights.config.sigma_reparam:
        plain = Folded(source, torch.float64)
        expected, folded = (partial(of_decoder, weights, None) for weights in (source, plain))
        found = max(found, difference(expected, folded, tokens, "the model without σReparam"))
    report(f"logits of {tokens.numel()} random tokens differ by {found:.1e} of the largest")
    return found


def difference(expected: Compute, actual: Compute, tokens: Tensor, what: str) -> float:
    """Returns the largest difference of logits of these tokens, relative to the largest logit.

    Raises:
        LogitsDifferError: it is above the bound, or no number.
    """
    a, b = actual(tokens), expected(tokens)
    found = float((a - b).abs().max() / b.abs().max())
    if not found <= BOUND:
        raise LogitsDifferError(
            f"convert: logits of {what} differ from those of the source by {found:.1e} of the "
            f"largest, and only {BOUND:.0e} is rounding; this is a fault of the conversion, whose "
            "folder did not get its name: report it"
        )
    return found


@torch.no_grad()
def of_decoder(
    weights: Weights, rounded: Mapping[str, torch.dtype] | None, tokens: Tensor
) -> Tensor:
    """Returns the logits of our decoder in fp64, in evaluation; where `rounded` is given, of
    tensors in these dtypes, by name."""
    with torch.device("meta"):
        model = Decoder(weights.config)
    model = model.to(torch.float64).to_empty(device="cpu").eval()
    for name, tensor in tensors_of(model):
        stored = weights.whole(name)
        tensor.copy_(stored if rounded is None else stored.to(rounded[name]))
    logits: Tensor = model(tokens, Context.of_rows(tokens))
    return logits


@torch.no_grad()
def of_transformers(architecture: str, folder: Path, tokens: Tensor) -> Tensor:
    """Returns the logits of transformers' model in a folder, in fp64.

    Raises:
        NotComparedError: transformers is not installed, or has no such class.
        LogitsDifferError: it finds other tensors than it looks for.
    """
    with without_gpu_packages():
        try:
            import transformers
        except ImportError as missing:
            extra = "pip install 'colonnade[bench]'"
            raise NotComparedError(f"transformers is not installed ({extra})") from missing
        version = transformers.__version__
        if int(version.partition(".")[0]) < 5 or not hasattr(transformers, architecture):
            raise NotComparedError(f"transformers {version} is too old for {architecture}")
        with fp64(), quiet(transformers):
            model, found = getattr(transformers, architecture).from_pretrained(
                folder,
                dtype=torch.float64,
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
            # Those it does not look for, as modules for further tokens, are no fault.
            if wrong := sorted(found["missing_keys"]) + sorted(found["mismatched_keys"]):
                raise LogitsDifferError(f"convert: {architecture} of {folder} lacks {wrong}")
            logits: Tensor = model.eval()(tokens.T, use_cache=False).logits
            return logits.transpose(0, 1)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Within it transformers reports neither progress nor advice."""
    log = transformers.utils.logging
    level, has_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if has_bar:
            log.enable_progress_bar()


class Lifted(TorchFunctionMode):
    """Turns every cast to fp32 into one to fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(
            lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {})
        )
        return func(*args, **kwargs)


@contextmanager
def fp64() -> Iterator[None]:
    """Makes a transformers model that is built and run inside compute in fp64 throughout.

    Its modules cast rotary angles, norms, softmax and router to fp32 whatever their parameters'
    dtype, which would cause errors of 1e-7.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Lifted():
            yield
    finally:
        torch.set_default_dtype(before)
