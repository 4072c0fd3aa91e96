"""How Hugging Face tensors are made of native ones: the rows of a family's table."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Entry:
    """A Hugging Face tensor (or several), and the native tensors that it is made of.

    Attributes:
        hf_names: one name; or several (one per expert), to be stacked along a new dimension 0, or,
            where `chunked`, concatenated along their dimension 0.
        native_names: one name; or several, which are concatenated along `dim`.
        dim: dimension of the native tensors along which they are concatenated.
        groups: number of equal groups (heads) along `dim`; the native tensors are concatenated
            within each group.
        order: within a group, native index i is Hugging Face index `order[i]`; None: equal order.
        squeeze: dimension of size 1 that only the Hugging Face tensor has.
        transposed: whether the last two dimensions are swapped in the Hugging Face tensor.
        chunked: whether several Hugging Face tensors are chunks of one, of equal size.
    """

    hf_names: tuple[str, ...]
    native_names: tuple[str, ...]
    dim: int = 0
    groups: int = 1
    order: tuple[int, ...] | None = None
    squeeze: int | None = None
    transposed: bool = False
    chunked: bool = False

    def widths(self, shapes: Shapes) -> list[int]:
        """Returns the size of each native tensor along `dim` within a group."""
        return [shapes[name][self.dim] // self.groups for name in self.native_names]

    def shape(self, shapes: Shapes) -> torch.Size:
        """Returns the shape of each Hugging Face tensor, given those of the native ones."""
        shape = list(shapes[self.native_names[0]])
        shape[self.dim] = sum(shapes[name][self.dim] for name in self.native_names)
        if self.chunked:
            shape[0] //= len(self.hf_names)
        elif len(self.hf_names) > 1:
            shape = shape[1:]
        if self.squeeze is not None:
            shape.insert(self.squeeze, 1)
        if self.transposed:
            shape[-2:] = shape[:-3:-1]
        return torch.Size(shape)

    def split(self, hf_tensors: list[Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Splits the Hugging Face tensors of this entry into native tensors, by name."""
        several = torch.cat if self.chunked else torch.stack
        packed = hf_tensors[0] if len(self.hf_names) == 1 else several(hf_tensors)
        if self.squeeze is not None:
            packed = packed.squeeze(self.squeeze)
        if self.transposed:
            packed = packed.transpose(-2, -1)
        grouped = packed.unflatten(self.dim, (self.groups, -1))
        if self.order is not None:
            index = torch.tensor(self.order, device=packed.device)
            grouped = grouped.index_select(self.dim + 1, index)
        native = grouped.split(self.widths(shapes), dim=self.dim + 1)
        flat = (tensor.flatten(self.dim, self.dim + 1) for tensor in native)
        return dict(zip(self.native_names, flat, strict=True))

    def of_expert(self, index: int) -> "Entry":
        """Returns the entry of one expert of several that are stacked."""
        return replace(self, hf_names=self.hf_names[index : index + 1], dim=max(0, self.dim - 1))

    def read(
        self, name: str, box: tuple[slice, ...], shapes: Shapes, source_of: Callable[[str], Any]
    ) -> Tensor:
        """Reads a box of one native tensor, and of each Hugging Face tensor no more than it needs
        where its rows are in the native order; otherwise it splits whole ones.

        Args:
            name: of the native tensor.
            box: a slice of each of its dimensions, with start and stop.
            shapes: of the native tensors.
            source_of: returns, for a Hugging Face name, what gives a tensor for a tuple of slices
                (`get_slice` of safetensors).
        """
        if self.chunked:
            chunks = [source_of(n)[(slice(None),) * len(self.shape(shapes))] for n in self.hf_names]
            return self.split(chunks, shapes)[name][box]
        if len(self.hf_names) > 1:  # experts: only those in the box
            inner = {n: torch.Size(shapes[n][1:]) for n in self.native_names}
            experts = range(box[0].start, box[0].stop)
            read = (self.of_expert(e).read(name, box[1:], inner, source_of) for e in experts)
            return torch.stack(list(read))
        source = source_of(self.hf_names[0])
        in_order = self.order is None and (self.groups == 1 or len(self.native_names) == 1)
        if not in_order or self.squeeze is not None:
            # dimensions before `dim` lie as in the native tensor, and only their part is read
            rank = len(self.shape(shapes))
            same = min(self.dim, rank - 2) if self.transposed else self.dim
            same = 0 if self.squeeze is not None else same
            part = source[(*box[:same], *(slice(None),) * (rank - same))]
            tensor: Tensor = self.split([part], shapes)[name]
            return tensor[(*(slice(None),) * same, *box[same:])]
        if len(self.native_names) > 1:  # they follow each other along `dim`
            before = self.native_names[: self.native_names.index(name)]
            start, at = sum(shapes[n][self.dim] for n in before), box[self.dim]
            moved = slice(at.start + start, at.stop + start)
            box = (*box[: self.dim], moved, *box[self.dim + 1 :])
        if self.transposed:
            box = (*box[:-2], box[-1], box[-2])
        found: Tensor = source[box]
        return found.transpose(-2, -1) if self.transposed else found

    def join(self, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Joins native tensors into the Hugging Face tensors of this entry, by name."""
        parts = [native[n].unflatten(self.dim, (self.groups, -1)) for n in self.native_names]
        grouped = torch.cat(parts, dim=self.dim + 1) if len(parts) > 1 else parts[0]
        if self.order is not None:
            inverse = torch.tensor(self.order, device=grouped.device).argsort()
            grouped = grouped.index_select(self.dim + 1, inverse)
        packed = grouped.flatten(self.dim, self.dim + 1)
        if self.squeeze is not None:
            packed = packed.unsqueeze(self.squeeze)
        if self.transposed:
            packed = packed.transpose(-2, -1).contiguous()
        hf_tensors: Iterable[Tensor] = [packed]
        if len(self.hf_names) > 1:
            count = len(self.hf_names)
            hf_tensors = packed.chunk(count) if self.chunked else packed.unbind()
        return dict(zip(self.hf_names, hf_tensors, strict=True))


def entry(
    hf_name: str,
    *native_names: str,
    dim: int = 0,
    groups: int = 1,
    order: Iterable[int] | None = None,
    squeeze: int | None = None,
    transposed: bool = False,
) -> Entry:
    """Returns the entry of one Hugging Face tensor, with the options of `Entry`."""
    indices = None if order is None else tuple(order)
    return Entry((hf_name,), native_names, dim, groups, indices, squeeze, transposed)


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
