"""The tables of a recipe, as frozen pydantic models; `launcher.recipe.load` reads them."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator

from colonnade.models.config import ModelConfig
from colonnade.parallel.config import ParallelConfig


class Table(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """One table of a recipe: immutable, without unknown fields or silent type conversions."""


AnyTable = TypeVar("AnyTable", bound=BaseModel)


def given(table: BaseModel) -> dict[str, Any]:
    """Returns the fields of a table that were set explicitly."""
    return {name: getattr(table, name) for name in table.model_fields_set}


def changed(table: AnyTable, update: Mapping[str, object], remove: Iterable[str] = ()) -> AnyTable:
    """Returns a table with some fields set, and those of `remove` as if they had not been given."""
    fields = given(table) | dict(update)
    return type(table).model_validate({n: v for n, v in fields.items() if n not in remove})


class OptimizerConfig(Table):
    """`[optimizer]`: the update rule and the schedule of its learning rate."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="update rule; muon: Muon on linear weights (arXiv:2502.16982), AdamW on "
        "embedding, head and all other parameters, at one learning rate",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="after the warm-up: a cosine to min_lr; wsd: constant, then a linear decay; "
        "constant",
    )
    warmup: int = Field(0, ge=0, le=2**40, description="steps of linear warm-up")
    decay: int | None = Field(
        None, ge=1, le=2**40, description="wsd: steps of the last, linear decay"
    )
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean of squares")
    momentum: float = Field(0.95, ge=0, lt=1, description="muon: decay of the mean of gradients")
    weight_decay: float = Field(0.1, ge=0, description="on weight matrices only")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    offload: Literal["none", "host", "interleaved"] = Field(
        "none",
        description="where AdamW's fp32 master weights and moments are: on the device; in the "
        "host's memory, which updates them; interleaved: as many as pay are updated on the device "
        "at the same time (on a GPU by measured rates, so that last bits vary from run to run "
        "unless train.deterministic)",
    )
    host_kernel: Literal["auto", "compiled", "deepspeed", "torch"] = Field(
        "auto",
        description="offload: AdamW on the host; auto: one pass, compiled at first use, where "
        "there is a compiler, else DeepSpeed's, else torch's",
    )
    pinned: Literal["prefer", "require"] = Field(
        "prefer",
        description="offload: whether a host that does not pin the memory is a fault, or only a "
        "warning, as copies become slow",
    )
    margin: float = Field(
        1.0, ge=0, description="interleaved: GiB of the device's memory that state leaves free"
    )
    offload_gradients: Literal["fp32", "bf16"] = Field(
        "fp32", description="offload: dtype of gradients on their way to the host; bf16 is inexact"
    )
    offload_moments: Literal["fp32", "bf16", "8bit"] = Field(
        "fp32",
        description="offload: moments in the host's memory and on their way; inexact: bf16, 8bit "
        "(arXiv:2110.02861), which is slow on the host",
    )


WITH_COLUMNS = ("jsonl", "parquet", "hub")  # formats whose records have columns


class SourceConfig(Table):
    """One entry of `[[data.sources]]`."""

    format: Literal["stdlib", "text", "jsonl", "parquet", "hub", "tokens", "auto"] = Field(
        "stdlib",
        description="what is read: stdlib is the source code of Python's standard library; auto "
        "(the default where a path is given) detects whether files are text, jsonl or parquet",
    )
    path: str | None = Field(
        None, description="file, folder or glob; hub: the data set's name; tokens: prefix of .bin"
    )
    weight: float = Field(1.0, gt=0, description="share of the mixture, relative to the others")
    column: str = Field("text", description="column that holds the text")
    prompt: str | None = Field(None, description="column put before the text, without loss")
    subset: str | None = Field(None, description="hub: configuration of the data set")
    split: str = Field("train", description="hub: split of the data set")
    stream: bool = Field(False, description="read while training instead of indexing first")

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, fields: object) -> object:
        """Sets the format to `auto` where a path is given without a format."""
        if isinstance(fields, dict) and fields.get("path") is not None and "format" not in fields:
            return {**fields, "format": "auto"}
        return fields


class DataConfig(Table):
    """`[data]`: the sources of tokens and how they become rows."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)] = (
        SourceConfig(),
    )
    tokenizer: str | None = Field(
        None,
        description="`bytes`, or the path of a tokenizer.json or of the folder that holds it; "
        "default: `bytes` for text",
    )
    eod: str | None = Field(
        None,
        description="token that ends a document; default: the end-of-text token, found by "
        "tokenizer_config.json, generation_config.json or a common name",
    )
    bos: str | None = Field(None, description="token put before every document; default: none")
    special_tokens: bool = Field(
        False, description="whether the spelling of a special token in a text becomes that token"
    )
    validation: float = Field(
        0.05, ge=0, lt=1, description="share of the documents held out for validation"
    )
    validation_sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        (), description="sources of validation, all of whose documents are read in order"
    )
    packing: Literal["stream", "whole"] = Field(
        "stream",
        description="stream splits the concatenated documents into rows; whole packs whole "
        "documents into rows by best fit and pads the remainder, so that no answer is trained "
        "without its prompt (longer than a row: split, or truncated if there is a prompt)",
    )
    cache: str | None = Field(None, description="folder for tokenised data; default: user cache")

    @property
    def held_out(self) -> float:
        """The share of the documents of `sources` that is held out for validation."""
        return 0.0 if self.validation_sources else self.validation

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources to train and to validate on."""
        return self.sources + self.validation_sources

    @property
    def tokenizer_name(self) -> str | None:
        """The tokenizer that is used; None if all sources are tokens and none is named."""
        text = any(source.format != "tokens" for source in self.all_sources)
        return self.tokenizer or ("bytes" if text else None)


class TrainConfig(Table):
    """`[train]`: length, batch, precision and reports of the run."""

    steps: int = Field(100, ge=1, le=2**40, description="optimizer steps of the whole run")
    global_batch: int = Field(16, ge=1, le=2**24, description="rows per step, over all ranks")
    micro_batch: int = Field(8, ge=1, le=2**20, description="rows per forward pass of one rank")
    ramp_batch: int | None = Field(
        None, ge=1, le=2**24, description="rows per step at the start of the ramp"
    )
    ramp_steps: int = Field(0, ge=0, le=2**40, description="steps until global_batch is reached")
    seq_len: int = Field(256, ge=1, le=2**31 - 1, description="tokens per row")
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32",
        description="of matrix products; bf16 keeps weights, optimizer state, norms and sums of "
        "gradients in fp32",
    )
    recompute: Literal["none", "selective", "block"] = Field(
        "none",
        description="activations that backward recomputes instead of storing: all but matrix "
        "products and attention (selective), or all but each sub-block's input (block)",
    )
    offload_inputs: bool = Field(
        False,
        description="keep the inputs of recomputed sub-blocks, and of their norms, in the host's "
        "memory from forward until shortly before backward needs them",
    )
    compile: bool = Field(
        False, description="compile the sub-blocks' halves (needs a C++ compiler)"
    )
    deterministic: bool = Field(False, description="use only deterministic operators")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU for each rank where there are enough, else the CPU"
    )
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="of initial weights, data order and random draws"
    )
    init: str | None = Field(
        None,
        description="a run, one of its checkpoints, or a Hugging Face folder, from whose weights "
        "the run starts, and which fills fields of [model] that are left open; default: random",
    )
    init_only: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="names of tensors to start from, as patterns of a shell; default: all"
    )
    init_skip: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="names of tensors that stay random, as patterns; default: none"
    )
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="names of parameters and buffers that training leaves as they are, as patterns "
        "of a shell (`blocks.3.*`): no gradient and no optimizer state; default: none",
    )
    validate_every: int = Field(
        0, ge=0, le=2**40, description="steps between validations; 0: at the end"
    )
    validate_rows: int = Field(
        64, ge=0, le=2**24, description="rows per validation; 0 never validates"
    )
    bad_steps: int = Field(
        5, ge=1, le=2**40, description="non-finite steps in a row that end the run"
    )
    loads_every: int | None = Field(
        None,
        ge=0,
        le=2**40,
        description="steps between records of the experts' loads in metrics.jsonl; 0: none; "
        "default: 200 records in a run",
    )
    collapse_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="a router has collapsed where this share of the tokens chooses one expert",
    )
    collapse_steps: int = Field(
        20, ge=0, le=2**40, description="steps in a row that report a collapsed router; 0: never"
    )
    timeline: int | None = Field(
        None,
        ge=1,
        le=2**40,
        description="the step of which timeline.svg and timeline.json show what every rank of a "
        "pipeline did when; default: none",
    )
    loss_chunk: int = Field(
        1024, ge=1, le=2**31 - 1, description="tokens whose logits are in memory at one time"
    )
    sample: int = Field(0, ge=0, le=2**31 - 1, description="tokens of text generated at the end")
    tensorboard: bool = Field(False, description="also write to RUN/tensorboard")
    wandb: bool = Field(False, description="also report to Weights & Biases, project colonnade")

    @property
    def loads_interval(self) -> int:
        """The steps between two records of loads, 0 for none; a long run has no more than others.

        A record has a number for every expert of every layer: 60 layers of 256 take 75 kB.
        """
        return -(-self.steps // 200) if self.loads_every is None else self.loads_every

    def passes_of_rank(self, rows: int, ranks: int) -> int:
        """The micro-batches that each of so many data-parallel ranks runs in a step of `rows`."""
        return -(-rows // (self.micro_batch * ranks))


class CheckpointConfig(Table):
    """`[checkpoint]`: when to save, and how many to keep."""

    every: int = Field(
        0, ge=0, le=2**40, description="steps between checkpoints; 0: only at the end"
    )
    minutes: float = Field(
        0, ge=0, le=2**20, description="minutes between checkpoints, beside `every`; 0: no limit"
    )
    keep: int = Field(2, ge=1, le=2**31 - 1, description="number of newest checkpoints to keep")
    keep_every: int = Field(
        0, ge=0, le=2**40, description="checkpoints of steps that it divides stay as well; 0: none"
    )
    asynchronous: bool = Field(
        True,
        description="save in a thread while training goes on, from copies in the host's memory; "
        "false: training waits, and needs no memory for copies",
    )
    usr1: Literal["stop", "save"] = Field(
        "stop", description="what SIGUSR1 does after the step: save and stop, or save and go on"
    )


class GuardConfig(Table):
    """`[guard]`: what a run does about silent corruption and bad data."""

    spike: float = Field(
        0.0,
        ge=0,
        description="a step whose loss is not finite, or is above the median of the last losses by "
        "more than this many standard deviations (1.4826 times their median absolute deviation), "
        "is a spike: the run goes back to a checkpoint before it and passes over its samples; "
        "0: off; 6 is usual",
    )
    window: int = Field(
        128,
        ge=2,
        le=10_000,
        description="losses to which the next one is compared; as long as there are fewer, only a "
        "loss that is not finite is a spike",
    )
    skip: int = Field(
        1, ge=1, le=2**20, description="steps that are passed over, of which the spike is the last"
    )
    limit: int = Field(
        3, ge=1, le=2**20, description="spikes within `window` steps; one more ends the run"
    )
    replay_every: int = Field(
        0,
        ge=0,
        le=2**40,
        description="steps between replays, in which every data-parallel rank repeats a "
        "micro-batch of another one, and the results have to be bit-equal; 0: none",
    )


class MonitorConfig(Table):
    """`[monitor]`: what a run tells of itself while it trains."""

    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port at which rank 0 serves the last metrics as text for Prometheus; 0: a "
        "free one, which is printed; default: none",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address that it serves on: this host alone; 0.0.0.0: every network of the "
        "host, without a password",
    )
    ranks_every: int = Field(
        20,
        ge=0,
        le=10_000,
        description="steps between comparisons of the ranks' own working times; 0: never",
    )
    slow_rank: float = Field(
        1.5,
        gt=1,
        description="a rank is named as slow where it works for this many times the median of all "
        "ranks",
    )


ROPE_SHAPES = ("rope_dim", "rope_fraction")  # the other rope_ fields change no parameter
OF_THE_JOB = ("timeout", "elastic")  # of [parallel]: no stage changes them


class StageTable(Table):
    """Fields of one table that a training stage may set; what it leaves out goes on as before."""


def stage_table(name: str, table: type[BaseModel], *fields: str) -> type[StageTable]:
    """Returns the `StageTable` of this name with some fields of a table."""
    infos: dict[str, Any] = {
        f: (table.model_fields[f].annotation, table.model_fields[f]) for f in fields
    }
    return create_model(name, __base__=StageTable, __module__=__name__, **infos)


# What changes between training stages: nothing that changes a parameter's shape.
StageModel = stage_table(
    "StageModel",
    ModelConfig,
    *(f for f in ModelConfig.model_fields if f.startswith("rope_") and f not in ROPE_SHAPES),
)
StageParallel = stage_table(
    "StageParallel",
    ParallelConfig,
    *(f for f in ParallelConfig.model_fields if f not in OF_THE_JOB),
)
StageOptimizer = stage_table(
    "StageOptimizer", OptimizerConfig, *(f for f in OptimizerConfig.model_fields if f != "name")
)
StageData = stage_table(
    "StageData", DataConfig, "sources", "validation", "validation_sources", "packing"
)
StageTrain = stage_table(
    "StageTrain", TrainConfig, "seq_len", "global_batch", "micro_batch", "recompute",
    "offload_inputs", "loss_chunk", "freeze", "validate_every", "validate_rows",
)  # fmt: skip


class StageConfig(Table):
    """One entry of `[[stage]]`: a training stage, which begins where the one before has ended."""

    steps: int | None = Field(
        None, ge=1, le=2**40, description="optimizer steps of the stage; or give `tokens`"
    )
    tokens: int | None = Field(
        None, ge=1, le=2**60, description="tokens of the stage, rounded up to whole steps"
    )
    epochs: float = Field(
        1.0, gt=0, description="how often a row may be read; a stage that reads more is refused"
    )
    model: StageModel = StageModel()  # type: ignore[valid-type]  # made of the tables above
    parallel: StageParallel = StageParallel()  # type: ignore[valid-type]
    optimizer: StageOptimizer = StageOptimizer()  # type: ignore[valid-type]
    data: StageData = StageData()  # type: ignore[valid-type]
    train: StageTrain = StageTrain()  # type: ignore[valid-type]

    def tables(self) -> dict[str, StageTable]:
        """Returns the tables of fields that it may set, by name."""
        return {name: value for name, value in self if isinstance(value, StageTable)}


class Recipe(Table):
    """One run, in the tables of its TOML file; `launcher/recipes/` has examples."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="letters, digits, `_`, `.` and `-`")
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    monitor: MonitorConfig = MonitorConfig()
    stage: Annotated[tuple[StageConfig, ...], Field(strict=False)] = Field(
        (), description="training stages, one after the other; none: one, of `train.steps`"
    )
