"""Exchanges plain objects through the launcher's store, which works without a process group."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from colonnade.launcher.errors import UserError

PATIENCE = 300.0  # seconds for which a rank waits for what the others tell
LEAVING = 10.0  # seconds for which rank 0 waits for others to leave


@dataclass
class StoreGather:
    """Gathers objects of all ranks. Every rank calls it equally often.

    Attributes:
        store: which all ranks reach.
        rank: of this process.
        size: the number of all ranks.
        patience: seconds to wait for another rank.
    """

    store: dist.Store
    rank: int
    size: int
    patience: float = PATIENCE
    calls: count = field(default_factory=count)

    def __call__(self, action: Callable[[], Any]) -> list[Any]:
        """Runs `action` on every rank; returns what it returned, by rank. JSON can represent it.

        Rank 0 gathers: asking every rank for the value of every other would take size² requests.

        Raises:
            UserError: `action` raised it on a rank, or ranks did not report in time.
        """
        key = f"gather/{next(self.calls)}"
        try:
            outcome = {"value": action()}
        except UserError as mistake:
            outcome = {"mistake": str(mistake)}
        self.store.set(f"{key}/{self.rank}", json.dumps(outcome))
        if self.rank == 0:
            self.store.set(f"{key}/all", json.dumps(self._gather(key)))
        gathered = json.loads(self._get(f"{key}/all", 2 * self.patience))
        if "mistake" in gathered:
            shared = UserError(gathered["mistake"])
            shared.agreed = True
            raise shared
        return gathered["values"]

    def __enter__(self) -> "StoreGather":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets rank 0 leave last: its process may serve the store that the others still read."""
        if kind is not None and not issubclass(kind, UserError):
            return  # this rank failed, and its end tells the others
        if self.rank:
            self.store.set(f"left/{self.rank}", "")
            return
        # ranks that have not left by then do not read, or have died
        with suppress(dist.DistStoreError):
            self.store.wait([f"left/{r}" for r in range(1, self.size)], timedelta(seconds=LEAVING))

    def _gather(self, key: str) -> dict[str, Any]:
        """Reads what all ranks told; a mistake of a rank is one of all."""
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        try:
            self.store.wait(keys, timedelta(seconds=self.patience))
        except dist.DistStoreError:
            silent = [str(rank) for rank, k in enumerate(keys) if not self.store.check([k])]
            return {
                "mistake": f"ranks {', '.join(silent)} have not reported in {self.patience:g} s: "
                "look for what their hosts printed"
            }
        outcomes = [json.loads(self.store.get(k)) for k in keys]
        mistakes = {outcome["mistake"] for outcome in outcomes if "mistake" in outcome}
        if mistakes:
            return {"mistake": "\n".join(sorted(mistakes))}
        return {"values": [outcome["value"] for outcome in outcomes]}

    def _get(self, key: str, seconds: float) -> bytes:
        """Waits for a value, and reads it."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError:
            raise UserError(f"rank 0 has not answered in {seconds:g} s") from None
        return self.store.get(key)
