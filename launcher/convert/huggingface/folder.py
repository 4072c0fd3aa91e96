"""Reads and writes folders of Hugging Face's: config.json and safetensors files."""

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colonnade.launcher.convert.huggingface.families import FAMILIES, family_of
from colonnade.launcher.convert.huggingface.family import (
    Family,
    Unsupported,
    to_ours,
    to_theirs,
    unread,
    without_absent,
)
from colonnade.launcher.convert.huggingface.fields import FP8
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.unused import without_unused
from colonnade.models.config import ModelConfig

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER = (  # files that say how text becomes tokens and how tokens are drawn
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
SHARD_BYTES = 5 * 10**9  # of a file, unless one tensor is larger


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder, by name, each read when it is asked for.

    Raises UserError where a file is missing, unreadable, or does not hold what the index says.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.files = folder, {}
        self.at: dict[str, str] = {}
        listed = listed_tensors(folder)
        for name in sorted(set(listed.values()) if listed else [SINGLE]):
            try:
                self.files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{folder / name} is no whole safetensors file ({error}); fetch it again"
                ) from error
            for key in self.files[name].keys():  # noqa: SIM118
                if listed and listed.get(key) != name:
                    raise UserError(
                        f"{folder / name} holds {key}, which {INDEX} does not list there; "
                        "the files belong to different models, or the index is old"
                    )
                self.at[key] = name
        if absent := sorted(set(listed or ()) - set(self.at)):
            raise UserError(
                f"{folder}: {INDEX} lists {absent[0]} in {(listed or {})[absent[0]]}, which does "
                f"not hold it ({len(absent)} such tensors); fetch that file again"
            )

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[self.at[name]].get_tensor(name)
        if tensor.dtype not in READABLE:
            raise UserError(
                f"{self.folder / self.at[name]}: {name} is {tensor.dtype}; only 16, 32 and 64 bit "
                f"floating point is read; {FP8}"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.at)

    def __len__(self) -> int:
        return len(self.at)


def read_hf(
    folder: str | Path, tell: Callable[[str], object] = warnings.warn
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model in a folder of Hugging Face's.

    Args:
        folder: with config.json and safetensors files.
        tell: gets a sentence on each thing that was accepted and left out, and on what transformers
            computes differently; by default it becomes a Python warning.

    Returns:
        our config, which holds as the `[model]` table of a recipe, and our tensors by name, in the
        dtypes of the files.

    Raises:
        UserError: a file is missing or broken, or there is something in it that we cannot
            represent: the message names the file and the field or tensor.
    """
    folder = Path(folder)
    theirs = read_json(folder / CONFIG)
    family = family_in(folder, theirs)

    def tell_of_folder(sentence: str) -> None:
        tell(f"{folder}: {sentence}")

    with ExitStack() as stack:
        try:
            config = family.config_from(theirs, tell_of_folder)
            shards = Shards(folder, stack)
            config = without_absent(family, config, shards, tell_of_folder)
            tensors = to_ours(family, config, shards)
        except Unsupported as error:
            raise UserError(f"{folder}: {error}") from None
        for sentence in unread(family, shards):
            tell_of_folder(sentence)
        return without_unused(config), tensors


def family_in(folder: Path, theirs: Mapping[str, Any]) -> Family:
    """The family that config.json names."""
    named = theirs.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise UserError(
            f"{folder / CONFIG}: architectures = {named!r}: one of {', '.join(sorted(FAMILIES))} "
            "must stand there, in a list"
        )
    try:
        return family_of(named[0])
    except Unsupported as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def listed_tensors(folder: Path) -> dict[str, str] | None:
    """Which file each tensor stands in, by the index, all of them there; None for a single file."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        raise UserError(
            f"{folder} holds both {SINGLE} and {INDEX}; take away the one that does not belong"
        )
    if single.exists():
        return None
    if not index.exists():
        raise UserError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; other formats are not read: convert "
            "them to safetensors"
        )
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} has no weight_map from tensors to files; fetch it again")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: weight_map names {name!r}, which is no file beside it")
    missing = sorted({name for name in listed.values() if not (folder / name).exists()})
    if missing:
        raise UserError(
            f"{folder}: {', '.join(missing)} missing, which {INDEX} names; fetch the missing files"
        )
    return listed


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name a folder of Hugging Face's, with "
            f"{CONFIG} and safetensors files"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def write_hf(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    family: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    like: str | Path | None = None,
) -> None:
    """Write a folder that transformers reads; it appears whole or not at all.

    Args:
        folder: must not exist yet.
        config: of our model.
        tensors: ours by name, written in their dtypes.
        family: architecture, such as "LlamaForCausalLM"; None: the one that has these sub-blocks.
        shard_bytes: how large a file may become.
        like: a folder of Hugging Face's, such as the one that the model was read from: the new one
            has its tokenizer's files, its bos, eos and pad tokens, and its longest sequence. None:
            no tokenizer, no such tokens, and the positions the model was scaled from.

    Raises:
        UserError: the folder exists or cannot be written, or no family can represent the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder")
    try:
        table = family_for(config) if family is None else family_of(family)
        fields = table.config_to(config)
        theirs = to_theirs(table, config, tensors)
        if like is not None:
            fields |= kept_fields(Path(like), fields)
    except Unsupported as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in theirs.values())
    fields["torch_dtype"] = dtypes.most_common(1)[0][0]
    fields = dict.fromkeys(TOKENS) | fields  # or transformers takes its class's own numbers
    coming = folder.with_name(f"{folder.name}.coming-{os.getpid()}")
    try:
        coming.mkdir(parents=True)
        write_tensors(coming, theirs, shard_bytes)
        write_json(coming / CONFIG, fields)
        for file in tokenizer_files(like):
            shutil.copyfile(file, coming / file.name)
        coming.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(coming, ignore_errors=True)


def tokenizer_files(like: str | Path | None) -> list[Path]:
    """The files in a folder of Hugging Face's that belong to its tokenizer."""
    named = [] if like is None else [Path(like) / name for name in TOKENIZER]
    return [file for file in named if file.is_file()]


def kept_fields(like: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config.json in `like` that say what its tokens mean, not what it computes.

    Raises Unsupported where one of its tokens is none of the new model's.
    """
    theirs = read_json(like / CONFIG)
    kept = {name: theirs.get(name) for name in TOKENS}
    for name, value in kept.items():
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not 0 <= token < fields["vocab_size"]:
                remedy = f"of {like}, but the model has {fields['vocab_size']} tokens"
                raise Unsupported(name, value, remedy)
    longest = theirs.get("max_position_embeddings")
    unscaled = not fields.get("rope_scaling") and isinstance(longest, int)
    return kept | ({"max_position_embeddings": longest} if unscaled else {})


def family_for(config: ModelConfig) -> Family:
    """The first family that can represent this model."""
    reasons = []
    for family in FAMILIES.values():
        try:
            family.config_to(config)
            return family
        except Unsupported as error:
            reasons.append(f"{family.architecture}: {error}")
    raise Unsupported("family", None, "none can represent this model:\n  " + "\n  ".join(reasons))


def write_tensors(folder: Path, theirs: Mapping[str, Tensor], shard_bytes: int) -> None:
    """One safetensors file, or several and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in theirs.items():
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}
        save_file(ready, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in theirs.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, with a newline at its end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
