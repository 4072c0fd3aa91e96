"""The cache of generation: keys, values and states of earlier tokens."""

from torch import Tensor


class Rows:
    """Cached rows `[S, ...]` in a buffer with room for more.

    The buffer doubles when it is full, and rows that are no longer needed make room at its begin:
    appending a row copies one row, on average, however many there are.
    """

    def __init__(self, rows: Tensor) -> None:
        self.buffer, self.start, self.stop = rows.detach(), 0, len(rows)

    def append(self, rows: Tensor) -> Tensor:
        """Appends rows; returns all of them, a view that later calls leave as it is."""
        if self.stop + len(rows) > len(self.buffer):
            kept = self.kept()
            capacity = 2 * (len(kept) + len(rows))
            self.buffer = kept.new_empty(capacity, *kept.shape[1:])
            self.buffer[: len(kept)] = kept
            self.start, self.stop = 0, len(kept)
        self.buffer[self.stop : self.stop + len(rows)] = rows.detach()
        self.stop += len(rows)
        return self.kept()

    def drop_all_but(self, last: int) -> None:
        """Drops all but the `last` rows."""
        self.start = max(self.start, self.stop - last)

    def kept(self) -> Tensor:
        """Returns the rows."""
        return self.buffer[self.start : self.stop]


class Cache:
    """Tensors computed from earlier tokens, by sub-block and role.

    Attention caches keys and values, latent attention its latents, convolutions their last inputs,
    recurrences their states. It is for passes without gradients.

    Attributes:
        padded: whether rows of the batch begin with padding: in each, the text is the last tokens,
            as many as its newest position says.
    """

    def __init__(self, padded: bool = False) -> None:
        self.padded = padded
        self.tensors: dict[tuple[int, str], Tensor] = {}
        self.rows: dict[tuple[int, str], Rows] = {}

    def get(self, index: int, role: str) -> Tensor | None:
        """Returns the tensor of the sub-block at `index` under `role`; None if there is none."""
        if (rows := self.rows.get((index, role))) is not None:
            return rows.kept()
        return self.tensors.get((index, role))

    def put(self, index: int, role: str, value: Tensor) -> None:
        """Stores `value` for later tokens."""
        self.tensors[index, role] = value

    def append(self, index: int, role: str, rows: Tensor, last: int | None = None) -> Tensor:
        """Returns the cached rows followed by `rows`; caches all of them, or the `last` ones."""
        cached = self.rows.get((index, role))
        if cached is None:
            cached, joined = Rows(rows), rows
            self.rows[index, role] = cached
        else:
            joined = cached.append(rows)
        if last is not None:
            cached.drop_all_but(last)
        return joined
