"""Loads of experts: their records in metrics.jsonl, and the report of a router that collapsed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import unused_setting


def shares(loads: Tensor, top_k: int) -> Tensor:
    """The fraction of the tokens that chose each expert, `[..., E]`, from loads `[..., E]`.

    A token chooses `top_k` experts, so an even load gives each expert top_k / E, and an expert that
    every token chooses has 1. A mixture without tokens gives 0.
    """
    return loads * top_k / loads.sum(-1, keepdim=True).clamp_min(1)


class LoadWatch:
    """Records the loads of all mixtures, and reports once per layer that its router collapsed.

    A layer is named by the index of its sub-block in the row; those of the modules for multi-token
    prediction follow the row's. The steps of a collapse are counted from the start of the process:
    a resumed run counts them anew, and reports a collapse that goes on once more.

    Attributes:
        counts: `[L, E]`, for how many steps in a row the expert got `train.collapse_share` of the
            tokens; None before the first step.
        reported: the layers whose collapse was reported.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # The conditions under which a collapse can be told from an even load are the field's.
        self.watches = unused_setting(recipe, "train.collapse_share") is None
        self.counts: Tensor | None = None
        self.reported: set[int] = set()

    def observe(
        self, step: int, loads: Mapping[int, Tensor], skipped: bool, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Returns what metrics.jsonl records of a step's loads.

        `loads` are the counts `[E]` of every layer's expert, `largest_share` the largest share of
        the tokens by layer, both in steps that record loads; `collapsed` names the expert and its
        share by layer, in the step in which that is reported.

        Args:
            step: the step, from 1.
            loads: counts `[E]` of the tokens of all ranks, by layer.
            skipped: the step updated nothing. The logits of its routers may be NaN, so it neither
                continues nor ends a collapse.
            say: prints a line.
        """
        train = self.recipe.train
        every = train.loads_interval
        # The last step is recorded in any case, so that every run has a record.
        recorded = every > 0 and (step % every == 0 or step == train.steps)
        watched = self.watches and not skipped
        if not loads or not (recorded or watched):
            return {}
        layers = sorted(loads)
        counts = torch.stack([loads[layer] for layer in layers]).double().cpu()
        fractions = shares(counts, self.recipe.model.top_k)
        metrics: dict[str, Any] = {}
        if recorded:
            rows, largest = counts.long().tolist(), fractions.amax(-1).tolist()
            metrics["loads"] = {str(layer): row for layer, row in zip(layers, rows, strict=True)}
            metrics["largest_share"] = {
                str(layer): round(share, 4) for layer, share in zip(layers, largest, strict=True)
            }
        if watched and (collapsed := self.collapses(layers, fractions)):
            metrics["collapsed"] = {
                str(layer): {"expert": expert, "share": round(share, 4)}
                for layer, (expert, share) in collapsed.items()
            }
            for layer, (expert, share) in collapsed.items():
                say(self.describe(step, layer, expert, share))
        return metrics

    def collapses(self, layers: list[int], fractions: Tensor) -> dict[int, tuple[int, float]]:
        """Counts a step with these `shares` of the layers' experts, `[L, E]`.

        Returns:
            expert and share of each layer whose collapse has to be reported now.
        """
        train = self.recipe.train
        over = fractions >= train.collapse_share
        before = torch.zeros_like(over, dtype=torch.int64) if self.counts is None else self.counts
        self.counts = (before + 1) * over
        found = {}
        for row in (self.counts >= train.collapse_steps).any(-1).nonzero().flatten().tolist():
            if layers[row] not in self.reported:
                # With several experts per token, several may have as many steps.
                lasting = fractions[row].where(self.counts[row] >= train.collapse_steps, -1.0)
                found[layers[row]] = int(lasting.argmax()), float(lasting.max())
        self.reported |= found.keys()
        return found

    def describe(self, step: int, layer: int, expert: int, share: float) -> str:
        """Returns the line about a collapse, with remedies."""
        model, train = self.recipe.model, self.recipe.train
        steer = (
            f"raise model.router_bias_rate = {model.router_bias_rate}"
            if model.router_bias
            else "set model.router_bias = true"
        )
        return (
            f"step {step}: the router of sub-block {layer} collapsed: {share:.0%} of the tokens "
            f"chose expert {expert} for {train.collapse_steps} steps in a row (train."
            f"collapse_share = {train.collapse_share}; even: {model.top_k / model.experts:.0%}). "
            f"Resume with a lower optimizer.lr = {self.recipe.optimizer.lr}, or in a new run "
            f"raise model.balance = {model.balance}, or {steer}"
        )
