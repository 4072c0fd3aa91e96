"""Maps between Hugging Face's models and ours, both ways: config fields and weights.

A family is a table of entries, each of which says how one of their tensors splits into ours. It
only moves elements (splits, stacks, permutations): both directions are bit-exact, and gradients go
through the same map as weights.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from colonnade.launcher.convert.huggingface.config import function_of
from colonnade.launcher.convert.huggingface.fields import (
    HARMLESS,
    INERT,
    Fields,
    Inert,
    Tell,
    Unsupported,
    silent,
)
from colonnade.models.config import ModelConfig
from colonnade.models.records import records_of

__all__ = [
    "Entry",
    "Family",
    "Unsupported",
    "entry",
    "interleaved",
    "stacked",
    "to_ours",
    "to_theirs",
    "without_absent",
]

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Entry:
    """One of their tensors (or several, stacked), and ours that it is made of.

    Attributes:
        theirs: one name; or several (one per expert), which stand stacked along a new dimension 0.
        ours: one name; or several, packed one behind the other along `dim`.
        dim: dimension along which ours are packed, of our tensors.
        groups: into how many equal parts `dim` falls, in each of which ours are packed (heads).
        order: within a group, theirs at `order[i]` is ours at i; None: the same order.
        squeeze: a dimension of size 1 that only theirs has, of their tensor.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    dim: int = 0
    groups: int = 1
    order: tuple[int, ...] | None = None
    squeeze: int | None = None

    def widths(self, shapes: Shapes) -> list[int]:
        """Size of each of ours along `dim` within a group."""
        return [shapes[name][self.dim] // self.groups for name in self.ours]

    def shape(self, shapes: Shapes) -> torch.Size:
        """The shape of each of theirs, from those of ours."""
        whole = list(shapes[self.ours[0]])
        whole[self.dim] = sum(shapes[name][self.dim] for name in self.ours)
        if len(self.theirs) > 1:
            whole = whole[1:]
        if self.squeeze is not None:
            whole.insert(self.squeeze, 1)
        return torch.Size(whole)

    def split(self, theirs: list[Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Ours, by name."""
        whole = theirs[0] if len(self.theirs) == 1 else torch.stack(theirs)
        if self.squeeze is not None:
            whole = whole.squeeze(self.squeeze)
        grouped = whole.unflatten(self.dim, (self.groups, -1))
        if self.order is not None:
            index = torch.tensor(self.order, device=whole.device)
            grouped = grouped.index_select(self.dim + 1, index)
        parts = grouped.split(self.widths(shapes), dim=self.dim + 1)
        flat = (part.flatten(self.dim, self.dim + 1) for part in parts)
        return dict(zip(self.ours, flat, strict=True))

    def join(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theirs, by name."""
        parts = [ours[name].unflatten(self.dim, (self.groups, -1)) for name in self.ours]
        grouped = torch.cat(parts, dim=self.dim + 1)
        if self.order is not None:
            index = torch.tensor(self.order, device=grouped.device).argsort()
            grouped = grouped.index_select(self.dim + 1, index)
        whole = grouped.flatten(self.dim, self.dim + 1)
        if self.squeeze is not None:
            whole = whole.unsqueeze(self.squeeze)
        each = whole.unbind() if len(self.theirs) > 1 else [whole]
        return dict(zip(self.theirs, each, strict=True))


def entry(
    theirs: str,
    *ours: str,
    dim: int = 0,
    groups: int = 1,
    order: Iterable[int] | None = None,
    squeeze: int | None = None,
) -> Entry:
    """One of their tensors, made of ours."""
    return Entry((theirs,), ours, dim, groups, None if order is None else tuple(order), squeeze)


def stacked(theirs: str, ours: str, count: int) -> Entry:
    """Theirs, one per expert with `{}` for its number, are one of ours."""
    return Entry(tuple(theirs.format(e) for e in range(count)), (ours,))


def interleaved(own: int, rotated: int) -> tuple[int, ...]:
    """`order` of `own` channels without positions, then `rotated` ones whose pairs are neighbours.

    Ours pairs channel i with i + rotated/2.
    """
    pairs = range(own, own + rotated)
    return (*range(own), *pairs[0::2], *pairs[1::2])


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's.

    Attributes:
        architecture: class name, as in `architectures` of a config.json.
        model_type: as there.
        read: their config, through `Fields`, to ours.
        write: ours to theirs, in the spelling that transformers 4 and 5 both read.
        entries: the tensors as they stand in a checkpoint.
        packed: the tensors as transformers 5 holds them in memory, if that differs (experts).
        copies: their tensors that are equal to another one of theirs: which one, by name. They may
            be absent, and are not written.
        ignored: ends of names of tensors that hold no weights (buffers derived from the config).
        left_out: starts of names of tensors that transformers ignores, and what they are.
        harmless: config fields that do not alter the function, beside those of `hf_config`.
        inert: config fields that alter nothing at these values, which is told; beside those there.
    """

    architecture: str
    model_type: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    entries: Callable[[ModelConfig], list[Entry]]
    packed: Callable[[ModelConfig], list[Entry]] | None = None
    copies: Callable[[ModelConfig], dict[str, str]] = lambda config: tied_head(config)
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    left_out: tuple[tuple[str, str], ...] = ()
    harmless: frozenset[str] = frozenset()
    inert: Inert = field(default_factory=dict)

    def config_from(self, theirs: Mapping[str, Any], tell: Tell = silent) -> ModelConfig:
        """Our config of their dictionary; `Unsupported` names a field that we cannot represent.

        `tell` gets a sentence on what was accepted and is not used, or is computed differently.
        """
        fields = Fields(theirs, tell=tell)
        remedy = f"but {self.architecture} is of type {self.model_type!r}; mend the wrong one"
        fields.only("model_type", self.model_type, null=self.model_type, remedy=remedy)
        try:
            config = self.read(fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(place) for place in first["loc"])
            raise Unsupported(name, first["input"], f"from config.json: {first['msg']}") from None
        fields.finish(HARMLESS | self.harmless, {**INERT, **self.inert})
        return config

    def config_to(self, config: ModelConfig) -> dict[str, Any]:
        """Their dictionary; `Unsupported` names a field of ours that they cannot represent."""
        theirs = {"architectures": [self.architecture], "model_type": self.model_type}
        theirs |= self.write(config)
        wanted, got = function_of(config), function_of(self.config_from(theirs))
        for name in wanted | got:
            value = wanted.get(name)
            if value != got.get(name):
                remedy = f"{self.architecture} can only be {got.get(name)!r} here"
                raise Unsupported(name, value, remedy)
        return theirs


def tied_head(config: ModelConfig) -> dict[str, str]:
    """`copies` of a family with Llama's names: a tied head is the embedding again."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}


def unread(family: Family, names: Iterable[str]) -> list[str]:
    """A sentence for each kind of tensors that transformers ignores, and that are left out."""
    given, sentences = list(names), []
    for start, what in family.left_out:
        found = sorted(name for name in given if name.startswith(start))
        if found:
            sentences.append(
                f"{len(found)} tensors are left out ({found[0]}, ...): {what}, which transformers "
                f"does not read for {family.architecture} either"
            )
    return sentences


def without_absent(
    family: Family, config: ModelConfig, names: Iterable[str], tell: Tell = silent
) -> ModelConfig:
    """The config of a checkpoint with these tensors: no `mtp` if they have no modules for it.

    Some are published without those modules, while their config still counts them.
    """
    if not config.mtp:
        return config
    given = set(names)
    for table in (family.entries, family.packed or family.entries):
        for e in table(config):
            if any(n.startswith("mtp.") for n in e.ours) and not given.isdisjoint(e.theirs):
                return config
    tell(f"config.json counts {config.mtp} modules for further tokens, and no file holds any")
    kept = config.model_fields_set - {"mtp", "mtp_pattern"}
    return ModelConfig(**{name: getattr(config, name) for name in kept})


def shapes_of(config: ModelConfig, state: bool = True) -> Shapes:
    """Our tensors' shapes, by name; without `state` those of parameters alone."""
    records = records_of(config).items()
    return {name: torch.Size(r.shape) for name, r in records if state or not r.state}


def entries_of(family: Family, config: ModelConfig, shapes: Shapes, packed: bool) -> list[Entry]:
    """The family's table, of the tensors in `shapes`. Every one of ours stands in it once."""
    entries = (family.packed if packed and family.packed else family.entries)(config)
    entries = [e for e in entries if any(name in shapes for name in e.ours)]
    named = sorted(name for e in entries for name in e.ours)
    if named != sorted(shapes):
        wrong = sorted({*named} ^ {*shapes}) or "some of ours stand in two entries"
        raise AssertionError(f"{family.architecture}'s table does not fit the model: {wrong}")
    return entries


def is_packed(family: Family, config: ModelConfig, theirs: Iterable[str]) -> bool:
    """Whether these are names of tensors in transformers 5's memory, not of a checkpoint."""
    if family.packed is None:
        return False
    in_memory = {name for e in family.packed(config) for name in e.theirs}
    on_disk = {name for e in family.entries(config) for name in e.theirs}
    return any(name in in_memory - on_disk for name in theirs)


def to_ours(
    family: Family, config: ModelConfig, theirs: Mapping[str, Tensor], state: bool = True
) -> dict[str, Tensor]:
    """Their tensors under our names, as views where possible.

    Args:
        family: of the model that `theirs` come from.
        config: of ours.
        theirs: weights, as in a checkpoint or as in transformers' memory; or their gradients. Each
            is looked up once (a tied head twice), so that it can be read when it is asked for.
        state: whether state beside the parameters (router biases) is there too.

    Raises:
        Unsupported: one of theirs is missing, left over, of the wrong shape, or should be equal to
            another one and is not. The error's field is its name.
    """
    shapes = shapes_of(config, state)
    unused = tuple(start for start, _ in family.left_out)
    left = {n for n in theirs if not n.endswith(family.ignored) and not n.startswith(unused)}
    for name, original in family.copies(config).items():
        if name in left and original in left and not torch.equal(theirs[name], theirs[original]):
            raise Unsupported(name, "different weights", f"should be equal to {original}")
        left.discard(name)
    ours: dict[str, Tensor] = {}
    for e in entries_of(family, config, shapes, is_packed(family, config, left)):
        shape = e.shape(shapes)
        ours |= e.split([taken(theirs, left, name, shape) for name in e.theirs], shapes)
    none_left(theirs, left, f"not a tensor of {family.architecture} with this config")
    return ours


def taken(tensors: Mapping[str, Tensor], left: set[str], name: str, shape: torch.Size) -> Tensor:
    """The tensor `name`, which is then no longer left."""
    if name not in left:
        raise Unsupported(name, "missing", f"a tensor of shape {tuple(shape)} is needed")
    left.remove(name)
    tensor = tensors[name]
    if tensor.shape != shape:
        raise Unsupported(name, tuple(tensor.shape), f"the config asks for shape {tuple(shape)}")
    return tensor


def none_left(tensors: Mapping[str, Tensor], left: set[str], remedy: str) -> None:
    """Every tensor has found its place."""
    if left:
        name = min(left)
        many = f" ({len(left)} such tensors)" if len(left) > 1 else ""
        raise Unsupported(name, tuple(tensors[name].shape), remedy + many)


def to_theirs(
    family: Family,
    config: ModelConfig,
    ours: Mapping[str, Tensor],
    packed: bool = False,
    state: bool = True,
) -> dict[str, Tensor]:
    """Our tensors under their names, as in a checkpoint (or `packed`, as in transformers' memory).

    Raises:
        Unsupported: one of ours is missing, left over, or of the wrong shape.
    """
    shapes, left = shapes_of(config, state), set(ours)
    checked = {name: taken(ours, left, name, shape) for name, shape in shapes.items()}
    none_left(ours, left, "not a tensor of a model with this config")
    theirs: dict[str, Tensor] = {}
    for e in entries_of(family, config, shapes, packed):
        theirs |= e.join(checked)
    return theirs
