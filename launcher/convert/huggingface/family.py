"""Maps between Hugging Face and native models, in both directions: config fields and weights.

A family is a table of entries, each of which says how a Hugging Face tensor splits into native
ones. The maps only move elements (split, stack, permute), so both directions are bit-exact, and
gradients map as weights do.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from colonnade.launcher.convert.huggingface.config import function_fields
from colonnade.launcher.convert.huggingface.fields import (
    HARMLESS,
    INERT,
    Fields,
    Inert,
    Notify,
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
    "from_hf",
    "interleaved",
    "stacked",
    "to_hf",
    "without_absent_mtp",
]

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Entry:
    """A Hugging Face tensor (or several, stacked), and the native tensors that it is made of.

    Attributes:
        hf_names: one name; or several (one per expert), to be stacked along a new dimension 0.
        native_names: one name; or several, which are concatenated along `dim`.
        dim: dimension of the native tensors along which they are concatenated.
        groups: number of equal groups (heads) along `dim`; the native tensors are concatenated
            within each group.
        order: within a group, native index i is Hugging Face index `order[i]`; None: equal order.
        squeeze: dimension of size 1 that only the Hugging Face tensor has.
    """

    hf_names: tuple[str, ...]
    native_names: tuple[str, ...]
    dim: int = 0
    groups: int = 1
    order: tuple[int, ...] | None = None
    squeeze: int | None = None

    def widths(self, shapes: Shapes) -> list[int]:
        """Returns the size of each native tensor along `dim` within a group."""
        return [shapes[name][self.dim] // self.groups for name in self.native_names]

    def shape(self, shapes: Shapes) -> torch.Size:
        """Returns the shape of each Hugging Face tensor, given those of the native ones."""
        shape = list(shapes[self.native_names[0]])
        shape[self.dim] = sum(shapes[name][self.dim] for name in self.native_names)
        if len(self.hf_names) > 1:
            shape = shape[1:]
        if self.squeeze is not None:
            shape.insert(self.squeeze, 1)
        return torch.Size(shape)

    def split(self, hf_tensors: list[Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Splits the Hugging Face tensors of this entry into native tensors, by name."""
        packed = hf_tensors[0] if len(self.hf_names) == 1 else torch.stack(hf_tensors)
        if self.squeeze is not None:
            packed = packed.squeeze(self.squeeze)
        grouped = packed.unflatten(self.dim, (self.groups, -1))
        if self.order is not None:
            index = torch.tensor(self.order, device=packed.device)
            grouped = grouped.index_select(self.dim + 1, index)
        native = grouped.split(self.widths(shapes), dim=self.dim + 1)
        flat = (tensor.flatten(self.dim, self.dim + 1) for tensor in native)
        return dict(zip(self.native_names, flat, strict=True))

    def read(
        self, name: str, box: tuple[slice, ...], shapes: Shapes, sources: Mapping[str, Any]
    ) -> Tensor:
        """Reads a box of one native tensor, and of each Hugging Face tensor no more than it needs
        where its rows are in the native order; otherwise it splits whole ones.

        Args:
            name: of the native tensor.
            box: a slice of each of its dimensions, with start and stop.
            shapes: of the native tensors.
            sources: by Hugging Face name, what gives a tensor for a tuple of slices (`get_slice` of
                safetensors).
        """
        if len(self.hf_names) > 1:  # experts: only those in the box
            one = replace(self, hf_names=self.hf_names[:1], dim=max(0, self.dim - 1))
            inner = {n: torch.Size(shapes[n][1:]) for n in self.native_names}
            experts = range(*box[0].indices(len(self.hf_names)))
            first = self.hf_names[0]
            return torch.stack(
                [
                    one.read(name, box[1:], inner, {first: sources[self.hf_names[e]]})
                    for e in experts
                ]
            )
        source = sources[self.hf_names[0]]
        in_order = self.order is None and (self.groups == 1 or len(self.native_names) == 1)
        if not in_order or self.squeeze is not None:
            whole = source[(slice(None),) * len(self.shape(shapes))]
            tensor: Tensor = self.split([whole], shapes)[name][box]
            return tensor
        if len(self.native_names) > 1:  # they follow each other along `dim`
            before = self.native_names[: self.native_names.index(name)]
            start, at = sum(shapes[n][self.dim] for n in before), box[self.dim]
            moved = slice(at.start + start, at.stop + start)
            box = (*box[: self.dim], moved, *box[self.dim + 1 :])
        part: Tensor = source[box]
        return part

    def join(self, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Joins native tensors into the Hugging Face tensors of this entry, by name."""
        grouped = torch.cat(
            [native[name].unflatten(self.dim, (self.groups, -1)) for name in self.native_names],
            dim=self.dim + 1,
        )
        if self.order is not None:
            inverse = torch.tensor(self.order, device=grouped.device).argsort()
            grouped = grouped.index_select(self.dim + 1, inverse)
        packed = grouped.flatten(self.dim, self.dim + 1)
        if self.squeeze is not None:
            packed = packed.unsqueeze(self.squeeze)
        hf_tensors = packed.unbind() if len(self.hf_names) > 1 else [packed]
        return dict(zip(self.hf_names, hf_tensors, strict=True))


def entry(
    hf_name: str,
    *native_names: str,
    dim: int = 0,
    groups: int = 1,
    order: Iterable[int] | None = None,
    squeeze: int | None = None,
) -> Entry:
    """Returns the entry of one Hugging Face tensor, with the options of `Entry`."""
    indices = None if order is None else tuple(order)
    return Entry((hf_name,), native_names, dim, groups, indices, squeeze)


def stacked(hf_name: str, native_name: str, count: int) -> Entry:
    """Returns the entry of one native tensor that stacks `count` Hugging Face tensors.

    `hf_name` has `{}` for the index of the expert.
    """
    return Entry(tuple(hf_name.format(e) for e in range(count)), (native_name,))


def interleaved(unrotated: int, rotated: int) -> tuple[int, ...]:
    """Returns `Entry.order` for rotary channels whose pairs are adjacent in Hugging Face's tensor.

    `rotated` channels follow `unrotated` ones without positions. The native rotation pairs channel
    i with i + rotated/2.
    """
    pairs = range(unrotated, unrotated + rotated)
    return (*range(unrotated), *pairs[0::2], *pairs[1::2])


def tied_head(config: ModelConfig) -> dict[str, str]:
    """Returns `Family.copies` for Llama's names: a tied head has the embedding's weights."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        architecture: class name, as in `architectures` of a config.json.
        model_type: as in config.json.
        read: converts a Hugging Face config, read through `Fields`, to a native one.
        write: converts a native config to Hugging Face fields that transformers 4 and 5 both read.
        entries: returns the tensors of a checkpoint.
        packed: returns the tensors as transformers 5 has them in memory, if that differs (experts).
        copies: returns the Hugging Face tensors that equal another one, which is the value, by
            name. They may be absent from a checkpoint, and are not written.
        ignored: suffixes of names of tensors without weights (buffers derived from the config).
        unread: (prefix of names, description) of tensors that transformers ignores.
        harmless: config fields that do not alter the function, in addition to `fields.HARMLESS`.
        inert: config fields that alter nothing at these values, in addition to `fields.INERT`;
            a notice names them.
    """

    architecture: str
    model_type: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    entries: Callable[[ModelConfig], list[Entry]]
    packed: Callable[[ModelConfig], list[Entry]] | None = None
    copies: Callable[[ModelConfig], dict[str, str]] = tied_head
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    unread: tuple[tuple[str, str], ...] = ()
    harmless: frozenset[str] = frozenset()
    inert: Inert = field(default_factory=dict)

    def config_from_hf(self, hf_config: Mapping[str, Any], notify: Notify = silent) -> ModelConfig:
        """Converts a Hugging Face config to a native one.

        `notify` is called with a sentence on each thing that was accepted and is not used, or that
        transformers computes differently.

        Raises:
            Unsupported: names a field that the native model cannot represent.
        """
        fields = Fields(hf_config, notify=notify)
        remedy = f"but {self.architecture} is of type {self.model_type!r}; mend the wrong one"
        fields.only("model_type", self.model_type, null=self.model_type, remedy=remedy)
        try:
            config = self.read(fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(key) for key in first["loc"])
            raise Unsupported(name, first["input"], f"from config.json: {first['msg']}") from None
        fields.finish(HARMLESS | self.harmless, {**INERT, **self.inert})
        return config

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Converts a native config to a Hugging Face one.

        Raises:
            Unsupported: names a native field that the family cannot represent.
        """
        hf_config = {"architectures": [self.architecture], "model_type": self.model_type}
        hf_config |= self.write(config)
        # Read the config back: a field that comes back with another value cannot be represented.
        expected = function_fields(config)
        actual = function_fields(self.config_from_hf(hf_config))
        for name in expected | actual:
            value = expected.get(name)
            if value != actual.get(name):
                remedy = f"{self.architecture} can only have {actual.get(name)!r}"
                raise Unsupported(name, value, remedy)
        return hf_config


def unread_tensors(family: Family, names: Iterable[str]) -> list[str]:
    """Returns a sentence for each kind of tensors that are left out, as in transformers."""
    all_names, sentences = list(names), []
    for prefix, description in family.unread:
        unread = sorted(name for name in all_names if name.startswith(prefix))
        if unread:
            sentences.append(
                f"{len(unread)} tensors are left out ({unread[0]}, ...): {description}, which "
                f"transformers does not read for {family.architecture} either"
            )
    return sentences


def without_absent_mtp(
    family: Family, config: ModelConfig, names: Iterable[str], notify: Notify = silent
) -> ModelConfig:
    """Returns the config for the tensors of a checkpoint: without `mtp` if they have no modules.

    Some checkpoints are published without these modules, while their config still counts them.
    """
    if not config.mtp:
        return config
    all_names = set(names)
    for table in (family.entries, family.packed or family.entries):
        for e in table(config):
            is_mtp = any(name.startswith("mtp.") for name in e.native_names)
            if is_mtp and not all_names.isdisjoint(e.hf_names):
                return config
    notify(f"config.json counts {config.mtp} modules for further tokens, and no file holds any")
    explicit = config.model_fields_set - {"mtp", "mtp_pattern"}
    return ModelConfig(**{name: getattr(config, name) for name in explicit})


def shapes_of(config: ModelConfig, state: bool = True) -> Shapes:
    """Returns the shapes of the native tensors by name; without `state` of parameters alone."""
    records = records_of(config).items()
    return {name: torch.Size(r.shape) for name, r in records if state or not r.state}


def entries_of(family: Family, config: ModelConfig, shapes: Shapes, packed: bool) -> list[Entry]:
    """Returns the family's entries of the native tensors in `shapes`.

    Raises AssertionError unless each native tensor is in exactly one of them.
    """
    entries = (family.packed if packed and family.packed else family.entries)(config)
    entries = [e for e in entries if any(name in shapes for name in e.native_names)]
    listed = sorted(name for e in entries for name in e.native_names)
    if listed != sorted(shapes):
        wrong = sorted({*listed} ^ {*shapes}) or "some tensors are in two entries"
        raise AssertionError(f"{family.architecture}'s table does not fit the model: {wrong}")
    return entries


def is_packed(family: Family, config: ModelConfig, hf_names: Iterable[str]) -> bool:
    """Whether these are the names of tensors in transformers 5's memory, not in a checkpoint."""
    if family.packed is None:
        return False
    in_memory = {name for e in family.packed(config) for name in e.hf_names}
    on_disk = {name for e in family.entries(config) for name in e.hf_names}
    return any(name in in_memory - on_disk for name in hf_names)


def from_hf(
    family: Family, config: ModelConfig, hf_tensors: Mapping[str, Tensor], state: bool = True
) -> dict[str, Tensor]:
    """Converts Hugging Face tensors to native ones, as views where possible.

    Args:
        family: of the Hugging Face model.
        config: native.
        hf_tensors: weights, as in a checkpoint or in transformers' memory; or their gradients. Each
            is looked up once (a tied head twice), so a mapping may read them lazily.
        state: whether state that is no parameter (router biases) is included.

    Returns:
        the native tensors by canonical name.

    Raises:
        Unsupported: a tensor is missing, unknown, has the wrong shape, or should equal another one
            and does not. The error's field is the tensor's name.
    """
    shapes = shapes_of(config, state)
    check_copies(family, config, hf_tensors)
    remaining = weights_among(family, config, hf_tensors)
    native: dict[str, Tensor] = {}
    for e in entries_of(family, config, shapes, is_packed(family, config, remaining)):
        shape = e.shape(shapes)
        tensors = [take(hf_tensors, remaining, name, shape) for name in e.hf_names]
        native |= e.split(tensors, shapes)
    check_all_taken(
        hf_tensors, remaining, f"not a tensor of {family.architecture} with this config"
    )
    return native


def check_copies(family: Family, config: ModelConfig, hf_tensors: Mapping[str, Tensor]) -> None:
    """Raises Unsupported if a tensor differs from another one that it should equal."""
    for name, original in family.copies(config).items():
        both = name in hf_tensors and original in hf_tensors
        if both and not torch.equal(hf_tensors[name], hf_tensors[original]):
            raise Unsupported(name, "different weights", f"should be equal to {original}")


def weights_among(family: Family, config: ModelConfig, names: Iterable[str]) -> set[str]:
    """Returns the names of tensors that have weights of the model, without copies of others."""
    prefixes, copies = tuple(prefix for prefix, _ in family.unread), family.copies(config)
    return {
        n
        for n in names
        if not n.endswith(family.ignored) and not n.startswith(prefixes) and n not in copies
    }


def check_shapes(
    family: Family, config: ModelConfig, hf_shapes: Mapping[str, tuple[int, ...]]
) -> list[Entry]:
    """Checks the names and shapes of Hugging Face tensors, without reading them.

    Returns:
        the entries of all native tensors.

    Raises:
        Unsupported: a tensor is missing, unknown, or has the wrong shape.
    """
    empty = {n: torch.empty(shape, device="meta") for n, shape in hf_shapes.items()}
    shapes, remaining = shapes_of(config), weights_among(family, config, empty)
    entries = entries_of(family, config, shapes, is_packed(family, config, remaining))
    for e in entries:
        for name in e.hf_names:
            take(empty, remaining, name, e.shape(shapes))
    check_all_taken(empty, remaining, f"not a tensor of {family.architecture} with this config")
    return entries


def take(
    tensors: Mapping[str, Tensor], remaining: set[str], name: str, shape: torch.Size
) -> Tensor:
    """Returns the tensor `name` and removes the name from `remaining`.

    Raises Unsupported if it is missing or has another shape.
    """
    if name not in remaining:
        raise Unsupported(name, "missing", f"a tensor of shape {tuple(shape)} is needed")
    remaining.remove(name)
    tensor = tensors[name]
    if tensor.shape != shape:
        raise Unsupported(name, tuple(tensor.shape), f"the config asks for shape {tuple(shape)}")
    return tensor


def check_all_taken(tensors: Mapping[str, Tensor], remaining: set[str], remedy: str) -> None:
    """Raises Unsupported, naming the first tensor, if any remains that the model does not have."""
    if remaining:
        name = min(remaining)
        many = f" ({len(remaining)} such tensors)" if len(remaining) > 1 else ""
        raise Unsupported(name, tuple(tensors[name].shape), remedy + many)


def to_hf(
    family: Family,
    config: ModelConfig,
    native: Mapping[str, Tensor],
    packed: bool = False,
    state: bool = True,
) -> dict[str, Tensor]:
    """Converts native tensors to Hugging Face ones, by name.

    Args:
        family: of the Hugging Face model.
        config: native.
        native: the tensors by canonical name.
        packed: whether to return them as in transformers' memory; else as in a checkpoint.
        state: whether state that is no parameter (router biases) is included.

    Raises:
        Unsupported: a native tensor is missing, unknown, or has the wrong shape.
    """
    shapes, remaining = shapes_of(config, state), set(native)
    checked = {name: take(native, remaining, name, shape) for name, shape in shapes.items()}
    check_all_taken(native, remaining, "not a tensor of a model with this config")
    hf_tensors: dict[str, Tensor] = {}
    for e in entries_of(family, config, shapes, packed):
        hf_tensors |= e.join(checked)
    return hf_tensors
