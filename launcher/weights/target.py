"""What a format is to `convert`: pieces that are read alone, their files, and what is beside."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from colonnade.launcher.checkpoint.manifest import FileRecord
from colonnade.launcher.weights.source import Weights


@dataclass(frozen=True)
class Piece:
    """A tensor to write, or a part of one.

    Attributes:
        name: of the tensor.
        key: in the file.
        offsets: of the part, zeros for a whole tensor.
        shape: of the part.
        whole: the tensor's shape.
        dtype: in which it is written.
        load: reads it.
    """

    name: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """The bytes of the part."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Reads it, in the dtype in which it is written."""
        return self.load().to(self.dtype).contiguous()


class Target(ABC):
    """A format to write.

    Attributes:
        weights: the source, as the format has it.
        metadata: of each safetensors file.
        place: the folder of these files within that of the model.
    """

    weights: Weights
    metadata: dict[str, str] | None = None
    place: str = ""

    @abstractmethod
    def describe(self) -> str:
        """Returns the name of the format, by which two conversions differ."""

    @abstractmethod
    def pieces(self, dtype: torch.dtype | None) -> Iterator[Piece]:
        """Yields what is to be written, in its order; None keeps each tensor's dtype."""

    @abstractmethod
    def dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """Returns the dtype in which each of our tensors is written."""

    @abstractmethod
    def logits(self, folder: Path, tokens: Tensor) -> Tensor:
        """Returns the logits `[S, B, V]` of tokens `[S, B]`, in fp64, of a folder that is written.

        Raises:
            NotComparedError: they cannot be computed here.
        """

    @abstractmethod
    def file_names(self, count: int) -> list[str]:
        """Returns the names of that many files."""

    @abstractmethod
    def finish(
        self, folder: Path, files: Mapping[str, Sequence[Piece]], records: dict[str, FileRecord]
    ) -> None:
        """Writes into the folder what comes with the tensors' files."""
