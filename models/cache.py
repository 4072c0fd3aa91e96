"""The cache of generation: keys, values and states of earlier tokens."""

import torch
from torch import Tensor


class Cache:
    """Tensors computed from earlier tokens, by sub-block and role.

    Attention caches keys and values, latent attention its latents, convolutions their last inputs,
    recurrences their states.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, str], Tensor] = {}

    def get(self, index: int, role: str) -> Tensor | None:
        """Returns the tensor of the sub-block at `index` under `role`; None if there is none."""
        return self.tensors.get((index, role))

    def put(self, index: int, role: str, value: Tensor) -> None:
        """Stores `value` for later tokens."""
        self.tensors[index, role] = value

    def append(self, index: int, role: str, rows: Tensor, last: int | None = None) -> Tensor:
        """Returns the cached rows followed by `rows`; caches all of them, or the `last` ones."""
        cached = self.get(index, role)
        rows = rows if cached is None else torch.cat([cached, rows])
        self.put(index, role, rows if last is None else rows[max(0, len(rows) - last) :])
        return rows
