"""Opens a trained model to run it forward: in one process, or sharded over ranks."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.cluster.environment import RankEnvironment
from colonnade.launcher.cluster.products import settle_products
from colonnade.launcher.cluster.ranks import (
    SINGLE_PROCESS,
    choose_device,
    prepare_rank,
    settle_threads,
)
from colonnade.launcher.cluster.rendezvous import connect
from colonnade.launcher.data.tokenizer import Tokenizer, tokenizer_of
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig
from colonnade.launcher.weights import source
from colonnade.launcher.weights.fill import fill
from colonnade.launcher.weights.source import (
    CheckpointWeights,
    Weights,
    open_weights,
    recipe_in_force,
)
from colonnade.models.decoder import Decoder
from colonnade.parallel.mesh import build_expert_mesh, build_mesh
from colonnade.parallel.parallelize import COMPUTE, narrow_weights, parallelize, storage_dtype
from colonnade.parallel.passes import Passes
from colonnade.parallel.pipeline.build import build_passes, local_stages, pipeline_stages
from colonnade.parallel.world import World, open_world

SEQ_LEN = 2048  # of weights that do not tell on which lengths they were trained
# what may be overridden: all else belongs to the model
TABLES = ("parallel.",)
FIELDS = (
    "train.precision", "train.device", "train.seq_len",
    "data.tokenizer", "data.eod", "data.bos", "data.special_tokens", "data.cache",
)  # fmt: skip

Notify = Callable[[str], object]


def ignore(sentence: str) -> None:
    """Takes no notice."""


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to run forward.

    Attributes:
        recipe: of `recipe_for`.
        passes: run the model, or this rank's stages of it; in evaluation mode.
        tokenizer: of its tokens; None: it is not known.
        mesh: the ranks; None: this process is the only one.
    """

    recipe: Recipe
    passes: Passes
    tokenizer: Tokenizer | None
    mesh: DeviceMesh | None = None

    @property
    def byte_lengths(self) -> torch.Tensor | None:
        """The bytes of every token of the vocabulary; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.byte_lengths()

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.passes.device


def recipe_for(path: Path, overrides: Sequence[str] = (), world_size: int = 1) -> Recipe:
    """Returns the recipe under which a trained model runs forward.

    It has the model; the tokenizer; of a run its precision, device and `seq_len`; of a Hugging Face
    folder fp32 (fp64 if the weights are), and for `seq_len` its max_position_embeddings. The layout
    of a run's training is not taken over.

    Args:
        path: a run, one of its checkpoints, or a Hugging Face folder.
        overrides: `field=value`, of [parallel] and of the fields in `FIELDS`.
        world_size: ranks.

    Raises:
        UserError: there is no model, or a field must not be overridden; RecipeError lists all
            faults of the layout at once.
    """
    check_overrides(overrides)
    with open_weights(path, ignore, check=False) as weights:
        recipe = described(weights, any(o.startswith("data.tokenizer=") for o in overrides))
    balance = recipe.model.balance_samples
    # a batch that suits every layout: only training is divided into steps
    sizes = {"micro_batch": balance, "global_batch": balance * world_size * 16}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=sizes)})
    with tempfile.TemporaryDirectory(prefix="colonnade-") as folder:
        file = Path(folder, "recipe.toml")
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        return load_recipe(file, overrides, world_size)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises UserError for a field that must not be overridden."""
    for text in overrides:
        field = text.partition("=")[0].strip()
        if "=" in text and not (field.startswith(TABLES) or field in FIELDS):
            raise UserError(
                f"{text}: a trained model takes [parallel], {', '.join(FIELDS)}; leave it out"
            )


def described(weights: Weights, other_tokenizer: bool) -> Recipe:
    """Returns the recipe of weights, without a layout; `other_tokenizer`: one is given instead."""
    name = source.tokenizer_of(weights.folder)
    data, train = DataConfig(), TrainConfig(seq_len=weights.seq_len or SEQ_LEN)
    if isinstance(weights, CheckpointWeights):
        of_run = recipe_in_force(weights.folder)
        data, train = (
            of_run.data,
            TrainConfig(
                seq_len=of_run.train.seq_len,
                precision=of_run.train.precision,
                device=of_run.train.device,
            ),
        )
    elif all(weights.dtype(tensor) == torch.float64 for tensor in weights.shapes):
        train = train.model_copy(update={"precision": "fp64"})
    known = name is not None or other_tokenizer
    text = SourceConfig(format="text" if known else "tokens", path="nothing is read from it")
    kept = {field: getattr(data, field) for field in ("eod", "bos", "special_tokens", "cache")}
    return Recipe(
        name="trained",
        model=weights.config,
        train=train,
        data=DataConfig(sources=(text,), tokenizer=name, **kept),
    )


@contextmanager
def opened(
    path: Path,
    overrides: Sequence[str] = (),
    notify: Notify = ignore,
    check: Callable[[Recipe, int], object] = lambda recipe, size: None,
) -> Iterator[Trained]:
    """Opens a trained model as the rank that this process is, or in this process alone. Collective.

    Args:
        path, overrides: as for `recipe_for`.
        notify: is called on rank 0 with a sentence on each thing in the weights that is left out.
        check: is called with the recipe and the number of ranks before anything is loaded.
    """
    environment = RankEnvironment.from_environment() or SINGLE_PROCESS
    recipe = recipe_for(path, overrides, environment.size)
    check(recipe, environment.size)
    if environment.size == 1:
        settle_threads(SINGLE_PROCESS)
        device = choose_device(recipe.train.device, SINGLE_PROCESS)
        settle_products(device)
        yield load(path, recipe, device, None, notify)
        return
    device, timeout = prepare_rank(environment, recipe.train.device), recipe.parallel.timeout
    store = connect(environment, device)
    with open_world(environment.rank, environment.size, device, store, timeout) as world:
        settle_products(device)
        yield load(path, recipe, device, world, notify if world.is_rank_zero else ignore)


def load(
    path: Path, recipe: Recipe, device: torch.device, world: World | None, notify: Notify = ignore
) -> Trained:
    """Loads weights into the model of `recipe_for`; collective over the ranks of `world`.

    Raises:
        UserError: the weights are damaged, or have what the model cannot represent.
    """
    tokenizer = tokenizer_of(recipe.data)
    if world is None:
        passes, mesh = build_alone(recipe, device), None
    else:
        passes, mesh = build_sharded(recipe, device, world)
    with open_weights(path, notify) as weights:
        passes.model.to_empty(device=device)
        fill(passes.model, weights)
    passes.model.eval()
    return Trained(recipe, passes, tokenizer, mesh)


def build_alone(recipe: Recipe, device: torch.device) -> Passes:
    """Builds the model on meta for one process."""
    with torch.device("meta"):
        model = Decoder(recipe.model, recipe.train.loss_chunk)
    model.to(storage_dtype(recipe.train.precision))
    narrow_weights(model, COMPUTE[recipe.train.precision])
    return Passes(model, device)


def build_sharded(recipe: Recipe, device: torch.device, world: World) -> tuple[Passes, DeviceMesh]:
    """Builds the sharded model, or this rank's stages of it, on meta."""
    mesh = build_mesh(recipe.parallel, world)
    stages = pipeline_stages(recipe.model, recipe.parallel, recipe.train.seq_len)
    with torch.device("meta"):
        local = local_stages(stages, recipe.parallel, mesh.get_local_rank("pp"))
        model = Decoder(recipe.model, recipe.train.loss_chunk, local)
    precision = recipe.train.precision
    divided = recipe.parallel.degrees(world.size)
    if precision == "bf16" and divided["dp_shard"] * divided["dp_replicate"] * divided["cp"] == 1:
        # what FSDP2 does in training, without its all-gather for every token
        wide = recipe.train.model_copy(update={"precision": "fp32"})
        without_fsdp = recipe.model_copy(update={"train": wide})
        parallelize(model, mesh, without_fsdp, build_expert_mesh(recipe.parallel, world))
        narrow_weights(model, COMPUTE[precision])
    else:
        parallelize(model, mesh, recipe, build_expert_mesh(recipe.parallel, world))
    return build_passes(model, stages, mesh, recipe, device), mesh
