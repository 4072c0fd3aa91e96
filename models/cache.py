"""What generation keeps of earlier tokens, so that only new ones are computed."""

import torch
from torch import Tensor


class Cache:
    """Tensors that earlier tokens left behind, by sub-block and role.

    Attention keeps keys and values, latent attention its latents, convolutions their last inputs,
    recurrences their states.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, str], Tensor] = {}

    def get(self, index: int, role: str) -> Tensor | None:
        """What the sub-block at `index` put under `role`."""
        return self.tensors.get((index, role))

    def put(self, index: int, role: str, value: Tensor) -> None:
        """Keep `value` for the tokens to come."""
        self.tensors[index, role] = value

    def extend(self, index: int, role: str, rows: Tensor, last: int | None = None) -> Tensor:
        """`rows` behind those kept before, all kept (or the `last`) for the tokens to come."""
        before = self.get(index, role)
        rows = rows if before is None else torch.cat([before, rows])
        self.put(index, role, rows if last is None else rows[max(0, len(rows) - last) :])
        return rows
