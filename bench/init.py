"""`bench init`: the memory in which ranks read their shards of somebody's weights.

Two ranks fill models that are sharded by FSDP2, by tensor parallelism, and by both kinds of stages,
from a Hugging Face folder with the sizes of Llama-3-8B's tensors in bf16, of as many layers as half
of the memory holds in fp32. What a rank holds above its shards is independent of their number.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from colonnade.bench.convert import MODEL, drop_cached, make_source, peak_memory, silent
from colonnade.bench.worker_pool import RankPool
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.weights.fill import fill
from colonnade.launcher.weights.source import open_weights
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.shapes import measure
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.gradients import local
from colonnade.parallel.mesh import build_mesh
from colonnade.parallel.parallelize import parallelize
from colonnade.parallel.pipeline.build import local_stages, pipeline_stages
from colonnade.parallel.world import World

LAYOUTS = ({"dp_shard": 2}, {"tp": 2}, {"pp": 2})


def run() -> dict[str, Any]:
    """Bytes of the ranks' shards and of what they hold above them, by layout."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        model = MODEL.changed(repeat=layers_that_fit())
        return measure_layouts(Path(folder).absolute() / "hf", model)


def measure_layouts(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Measures all layouts on a model with random weights, each with ranks of its own."""
    figures: dict[str, Any] = {"layers": model.repeat, "bytes on disk": make_source(folder, model)}
    for layout in LAYOUTS:
        ((axis, degree),) = layout.items()
        with RankPool(2) as pool:
            ranks = pool.run(filled, folder, model, layout)
        for kind in ("shard", "above"):
            figures[f"{axis}={degree}, {kind} bytes"] = max(rank[kind] for rank in ranks)
    return figures


def layers_that_fit() -> int:
    """Returns how many layers two ranks hold in half of the available memory."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (free,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    one, two = (measure(MODEL.changed(repeat=n), 1).parameters for n in (1, 2))
    return max(1, min(MODEL.repeat, (free // 2 // 4 - one) // (two - one) + 1))


def filled(
    world: World, folder: Path, model: ModelConfig, layout: dict[str, int]
) -> dict[str, int]:
    """Fills this rank's shards; returns their bytes, and the growth of anonymous memory above."""
    recipe = Recipe(model=model, parallel=ParallelConfig.model_validate(layout))
    mesh = build_mesh(recipe.parallel, world)
    stages = pipeline_stages(model, recipe.parallel, recipe.train.seq_len)
    local_rank = mesh["pp"].get_local_rank()
    with torch.device("meta"):
        decoder = Decoder(model, stages=local_stages(stages, recipe.parallel, local_rank))
    parallelize(decoder, mesh, recipe)
    for path in folder.glob("*.safetensors"):
        drop_cached(path)
    with peak_memory() as peak:
        decoder.to_empty(device=world.device)
        with open_weights(folder, silent) as weights:
            fill(decoder, weights)
    shards = [local(t) for t in (*decoder.parameters(), *decoder.buffers())]
    held = sum(t.numel() * t.element_size() for t in shards)
    return {"shard": held, "above": peak[0] - held}
