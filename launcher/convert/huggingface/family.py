"""Maps between Hugging Face and native models, in both directions: config fields and weights.

A family is a table of entries, each of which says how a Hugging Face tensor splits into native
ones. The maps only move elements (split, stack, permute), so both directions are bit-exact, and
gradients map as weights do.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from colonnade.launcher.convert.huggingface.config import function_fields
from colonnade.launcher.convert.huggingface.entry import Entry, Shapes
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

Table = Callable[[ModelConfig], list[Entry]]


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
        also_read: other tables of the tensors of a checkpoint, which are read and never written.
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
    entries: Table
    packed: Table | None = None
    also_read: tuple[Table, ...] = ()
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

    def fields_of(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the Hugging Face fields of a native config, some of whose fields they may lack.

        Raises:
            Unsupported: a value of a native field has no Hugging Face value.
        """
        hf_config = {"architectures": [self.architecture], "model_type": self.model_type}
        return hf_config | self.write(config)

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Converts a native config to a Hugging Face one.

        Raises:
            Unsupported: names a native field that the family cannot represent.
        """
        hf_config = self.fields_of(config)
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
    for table in tables_of(family):
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


def tables_of(family: Family) -> tuple[Table, ...]:
    """Returns the tables by which a family's tensors are read."""
    return (family.entries, *([family.packed] if family.packed else []), *family.also_read)


def entries_of(family: Family, config: ModelConfig, shapes: Shapes, packed: bool) -> list[Entry]:
    """Returns the family's entries of the native tensors in `shapes`, as they are written.

    Raises AssertionError unless each native tensor is in exactly one of them.
    """
    table = family.packed if packed and family.packed else family.entries
    return entries_in(table, family, config, shapes)


def entries_in(table: Table, family: Family, config: ModelConfig, shapes: Shapes) -> list[Entry]:
    """As `entries_of`, of one of the family's tables."""
    entries = table(config)
    entries = [e for e in entries if any(name in shapes for name in e.native_names)]
    listed = sorted(name for e in entries for name in e.native_names)
    if listed != sorted(shapes):
        wrong = sorted({*listed} ^ {*shapes}) or "some tensors are in two entries"
        raise AssertionError(f"{family.architecture}'s table does not fit the model: {wrong}")
    return entries


def table_with(family: Family, config: ModelConfig, hf_names: Iterable[str]) -> Table:
    """Returns the table of the family whose names of tensors are nearest to these."""
    tables, given = tables_of(family), set(hf_names)
    if len(tables) == 1:
        return family.entries

    def unlike(table: Table) -> int:
        return len(given ^ {name for e in table(config) for name in e.hf_names})

    return min(tables, key=unlike)


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
    for e in entries_in(table_with(family, config, remaining), family, config, shapes):
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
    entries = entries_in(table_with(family, config, remaining), family, config, shapes)
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
