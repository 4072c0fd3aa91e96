"""Builds the stages of a pipeline, and what runs the passes of a model or of its stages."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch.distributed.device_mesh import DeviceMesh

from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Stage
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.parallelize import Settings
from colonnade.parallel.passes import Passes
from colonnade.parallel.pipeline.pipeline import Pipeline
from colonnade.parallel.pipeline.placement import Placement, divide_row


def pipeline_stages(config: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[Stage]:
    """Returns all stages of a layout, in order; without a pipeline there is one."""
    if parallel.pp == 1:
        return [Stage(0, len(config.symbols))]
    bounds = accumulate(divide_row(config, parallel, seq_len), initial=0)
    return [Stage(start, stop) for start, stop in pairwise(bounds)]


def local_stages(stages: Sequence[Stage], parallel: ParallelConfig, rank: int) -> list[Stage]:
    """Returns the stages of a rank along `pp`."""
    if parallel.pp == 1:
        return list(stages)
    return [stages[i] for i in Placement.of(parallel).stages_of(rank)]


def build_passes(
    model: Decoder,
    stages: Sequence[Stage],
    mesh: DeviceMesh,
    recipe: Settings,
    device: torch.device,
    rank: int | None = None,
) -> Passes:
    """Builds what runs the passes of a model, or of this rank's `stages` of it; `rank` as in
    `Pipeline`."""
    if recipe.parallel.pp == 1:
        return Passes(model, device)
    return Pipeline(model, stages, mesh, recipe, device, rank)
