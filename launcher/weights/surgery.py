"""Weight surgery: other models made of the weights of one, box by box, by `convert --edit`.

ladder=N            ladder residual over the last N sub-blocks (all: over all)
blocks=0-3,3,5      the row of these sub-blocks of the source, dropped or repeated
norm=pre_rms        Pre-RMSNorm of LayerNorm, exactly
experts=8,top_k=2   every MLP becomes a mixture of copies of it, with a new router
average=PATH        the mean with the weights of another folder; several: of all
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from colonnade.launcher.convert.huggingface.config import function_fields, pattern_fields
from colonnade.launcher.convert.huggingface.family import shapes_of
from colonnade.launcher.convert.recentre import check_layer_norm
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig
from colonnade.launcher.recipe.unused import without_unused
from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.weights.source import Box, Notify, Weights, open_weights
from colonnade.models.config import ModelConfig
from colonnade.models.records import records_of
from colonnade.parallel.materialise import fill_shard

OF_A_SUB_BLOCK = re.compile(r"(blocks|norms|after)\.(\d+)\.(.+)")
OF_ATTENTIONS = ("full_attention", "unrotated")  # fields that count the attentions of the row


class Edited(Weights):
    """Weights of another model made of those of a source; by default the same tensors.

    Args:
        source: of the weights.
        fields: of its config that are other.
    """

    def __init__(self, source: Weights, **fields: object) -> None:
        self.source, self.folder, self.seq_len = source, source.folder, source.seq_len
        self.config = checked(source.config.changed(**fields))
        self.shapes = shapes_of(self.config)

    @property
    def folders(self) -> list[Path]:
        return self.source.folders

    def name_in_source(self, name: str) -> str:
        """Returns the tensor of the source from which a tensor is made."""
        return name

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self.name_in_source(name))

    def read(self, name: str, box: Box) -> Tensor:
        return self.source.read(self.name_in_source(name), box)


def checked(config: ModelConfig) -> ModelConfig:
    """Returns a config without settings that have no effect; raises UserError for one that no model
    can have."""
    config = without_unused(config)
    tokens = DataConfig(sources=(SourceConfig(format="tokens", path="tokens"),))
    train = TrainConfig(seq_len=min(256, config.learned_positions or 256))
    faults = validate(Recipe(model=config, data=tokens, train=train), None)
    if faults:
        raise UserError(f"convert --edit: the model cannot be: {faults[0]}")
    return config


def with_ladder(source: Weights, value: str) -> Weights:
    """Returns the model with ladder residual over the last `value` sub-blocks, or `all`
    (arXiv:2501.06589, section 3.4): the same weights, to be trained on."""
    last = None if value == "all" else number("ladder", value, least=0)
    if last is not None and last > len(source.config.symbols):
        raise UserError(
            f"convert --edit ladder={value}: the row has {len(source.config.symbols)} sub-blocks"
        )
    return Edited(source, residual="ladder", ladder_last=last)


class Reordered(Edited):
    """A row of sub-blocks of the source, each with its norms."""

    def __init__(self, source: Weights, rows: Sequence[int]) -> None:
        c = source.config
        self.rows = list(rows)
        attentions = [t for t, symbol in enumerate(c.symbols) if symbol == "*"]
        kept = [attentions.index(t) for t in self.rows if c.symbols[t] == "*"]
        fields: dict[str, object] = {
            name: tuple(n for n, before in enumerate(kept) if before in getattr(c, name))
            for name in OF_ATTENTIONS
            if getattr(c, name)
        }
        if c.residual == "ladder" and c.ladder_last is not None:
            fields["ladder_last"] = min(c.ladder_last, len(self.rows))
        symbols = "".join(c.symbols[t] for t in self.rows)
        positions = [c.norm_positions(c.symbols)[t] for t in self.rows]
        for t, old, new in zip(self.rows, positions, c.norm_positions(symbols), strict=True):
            if old != new:
                raise UserError(
                    f"convert --edit blocks: sub-block {t} of the source has norms {old!r}, and "
                    f"behind another sequence mixer would have {new!r} (model.norm_after = "
                    f"{c.norm_after!r}); take a sequence mixer and what follows it together"
                )
        if c.norm_after:
            fields |= norms_after(c, symbols, positions)
        super().__init__(source, **pattern_fields(symbols), **fields)

    def name_in_source(self, name: str) -> str:
        if match := OF_A_SUB_BLOCK.fullmatch(name):
            kind, index, rest = match.groups()
            return f"{kind}.{self.rows[int(index)]}.{rest}"
        return name


def norms_after(config: ModelConfig, symbols: str, positions: Sequence[str]) -> dict[str, object]:
    """Returns the fields of the positions of norms for a row of some of the sub-blocks."""
    further = config.mtp_pattern if config.mtp else ""
    if {*positions, *config.norm_positions(further)} == {"after"}:
        return {"norm_position": "after", "norm_after": ""}
    return {"norm_after": "".join(s for s in config.norm_after if s in symbols + further)}


def with_blocks(source: Weights, value: str) -> Weights:
    """Returns the model of these sub-blocks of the source's row, such as `0-7,4-11`."""
    count, rows = len(source.config.symbols), list[int]()
    if source.config.share:
        raise UserError("convert --edit blocks: model.share = true has one set of sub-blocks")
    for part in value.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (count, count)
        if not first <= last < count:
            raise UserError(
                f"convert --edit blocks={value}: {part!r} is none of the source's sub-blocks 0 to "
                f"{count - 1}; write them as 0-3,3,5"
            )
        rows += range(first, last + 1)
    return Reordered(source, rows)


class Centred(Edited):
    """Pre-RMSNorm of LayerNorm (arXiv:2305.14858): the model centres at use what is added to the
    stream; a tied head is untied, because the embedding is centred and the head must not be."""

    def __init__(self, source: Weights) -> None:
        try:
            check_layer_norm(source.config)
        except ValueError as error:
            raise UserError(f"convert --edit norm=pre_rms: {error}") from None
        super().__init__(source, norm="pre_rms", tied=False)

    def name_in_source(self, name: str) -> str:
        tied = self.source.config.tied and name == "head.weight"
        return "embedding.weight" if tied else name


def with_norm(source: Weights, value: str) -> Weights:
    """Returns the model with Pre-RMSNorms in place of its LayerNorms."""
    if value != "pre_rms":
        raise UserError(f"convert --edit norm={value}: only pre_rms is made, of layer")
    return Centred(source)


class Upcycled(Edited):
    """Mixtures of copies of the source's MLPs (arXiv:2212.05055), whose weights sum to 1, so that
    the model computes what the source does, whatever its router chooses. The router is random."""

    def __init__(self, source: Weights, experts: int, top_k: int) -> None:
        c = source.config
        super().__init__(
            source,
            pattern=c.pattern.replace("-", "E"),
            experts=experts,
            top_k=top_k,
            expert_ffn=c.ffn,
            shared_ffn=0,
            router_score="softmax",
            router_normalise=True,
            router_scale=1.0,
            capacity=None,
        )
        self.records = records_of(self.config)

    def is_new(self, name: str) -> bool:
        """Whether the source has no such tensor: that of a router."""
        return name not in self.source.shapes

    def dtype(self, name: str) -> torch.dtype:
        first = next(iter(self.source.shapes))
        return self.source.dtype(first if self.is_new(name) else name)

    def read(self, name: str, box: Box) -> Tensor:
        if self.is_new(name):
            shape = tuple(self.shapes[name])
            drawn = torch.empty(shape, dtype=torch.float32)
            fill_shard(drawn, shape, (0,) * len(shape), self.records[name].fill, f"0/{name}")
            return drawn[box]
        of_mlp = self.source.shapes[name]
        if of_mlp == self.shapes[name]:
            return self.source.read(name, box)
        copies = box[0].stop - box[0].start
        if len(of_mlp) == len(box):  # a number, of which every expert has one
            return self.source.whole(name).expand(copies, *of_mlp[1:])
        of_one = self.source.read(name, box[1:])
        return of_one.expand(copies, *of_one.shape)


def with_experts(source: Weights, value: str) -> Weights:
    """Returns the model whose MLPs are mixtures of copies: `experts=8,top_k=2`."""
    experts, _, rest = value.partition(",")
    if not rest.startswith("top_k="):
        raise UserError(f"convert --edit experts={value}: write it as experts=8,top_k=2")
    count = number("experts", experts, least=2)
    top_k = number("top_k", rest.removeprefix("top_k="), least=2)
    config = source.config
    if "-" not in config.symbols or config.has("E", "T"):
        raise UserError(
            f"convert --edit experts={value}: the model needs MLPs (`-`) and no experts yet, and "
            f"its row is {config.pattern!r}"
        )
    if top_k > count:
        raise UserError(f"convert --edit experts={value}: top_k is above the number of experts")
    if config.mlp_bias:
        raise UserError(f"convert --edit experts={value}: experts have no biases, and MLPs here do")
    return Upcycled(source, count, top_k)


class Averaged(Edited):
    """The mean of the weights of several models, in at least fp32."""

    def __init__(self, sources: Sequence[Weights]) -> None:
        super().__init__(sources[0])
        self.sources = sources

    @property
    def folders(self) -> list[Path]:
        return [folder for source in self.sources for folder in source.folders]

    def read(self, name: str, box: Box) -> Tensor:
        total = None
        for source in self.sources:
            one = source.read(name, box)
            wide = one.to(torch.promote_types(one.dtype, torch.float32))
            total = wide if total is None else total + wide
        assert total is not None
        return total / len(self.sources)


EDITS: dict[str, Callable[[Weights, str], Weights]] = {
    "ladder": with_ladder,
    "blocks": with_blocks,
    "norm": with_norm,
    "experts": with_experts,
}


def edited(source: Weights, edits: Sequence[str], stack: ExitStack, notify: Notify) -> Weights:
    """Returns the weights of a source after these edits, in their order; averages come first.

    Args:
        source: that is edited.
        edits: `NAME=VALUE` each, as above.
        stack: closes the other sources of an average.
        notify: is called with a sentence on what is left out of those.

    Raises:
        UserError: an edit that does not exist, or that the model does not allow.
    """
    named = [(text, *text.partition("=")[::2]) for text in edits]
    others = [
        stack.enter_context(open_weights(Path(value), notify))
        for _, name, value in named
        if name == "average"
    ]
    weights = average(source, others) if others else source
    for text, name, value in named:
        if name == "average":
            continue
        if name not in EDITS:
            known = ", ".join([*EDITS, "average"])
            raise UserError(f"convert --edit {text}: give one of {known}, as NAME=VALUE")
        try:
            weights = EDITS[name](weights, value)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"convert --edit {text}: {first['msg']}") from None
    return weights


def average(source: Weights, others: Sequence[Weights]) -> Weights:
    """Returns the mean of weights; raises UserError unless all are of one model."""
    for other in others:
        if other.shapes != source.shapes:
            names = sorted({*other.shapes.items()} ^ {*source.shapes.items()})
            raise UserError(
                f"convert --edit average={other.folder}: it has other tensors than "
                f"{source.folder}, such as {names[0][0]}; average checkpoints of one model"
            )
        first, second = function_fields(source.config), function_fields(other.config)
        if differ := sorted(n for n in first | second if first.get(n) != second.get(n)):
            raise UserError(
                f"convert --edit average={other.folder}: its {differ[0]} is "
                f"{second.get(differ[0])!r}, and that of {source.folder} is "
                f"{first.get(differ[0])!r}; average checkpoints of one model and training stage"
            )
    return Averaged([source, *others])


def number(name: str, text: str, least: int) -> int:
    """Parses a whole number of an edit."""
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"convert --edit {name}={text}: give a whole number, at least {least}")
    return int(text)
