"""Reads and writes Hugging Face folders: config.json and safetensors files."""

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colonnade.launcher.convert.huggingface.families import FAMILIES, family_of
from colonnade.launcher.convert.huggingface.family import (
    Family,
    Unsupported,
    from_hf,
    to_hf,
    unread_tensors,
    without_absent_mtp,
)
from colonnade.launcher.convert.huggingface.fields import FP8
from colonnade.launcher.convert.huggingface.nearest import family_for
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.unused import without_unused
from colonnade.models.config import ModelConfig

T = TypeVar("T")
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER = (  # files of the tokenizer, of chat templates and of sampling defaults
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
SHARD_BYTES = 5 * 10**9  # largest file, unless one tensor is larger


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name; each is read from its file when it is looked up.

    Raises UserError where a file is missing, unreadable, or contradicts the index.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.files = folder, {}
        self.file_of: dict[str, str] = {}
        weight_map = read_index(folder)
        for name in sorted(set(weight_map.values()) if weight_map else [SINGLE]):
            try:
                self.files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{folder / name} is not a complete safetensors file ({error}); fetch it again"
                ) from error
            for key in self.files[name].keys():  # noqa: SIM118
                if weight_map and weight_map.get(key) != name:
                    raise UserError(
                        f"{folder / name} holds {key}, which {INDEX} does not list in this file; "
                        "the files belong to different models, or the index is old"
                    )
                self.file_of[key] = name
        if absent := sorted(set(weight_map or ()) - set(self.file_of)):
            file = (weight_map or {})[absent[0]]
            raise UserError(
                f"{folder}: {INDEX} lists {absent[0]} in {file}, which does not "
                f"hold it ({len(absent)} such tensors); fetch that file again"
            )

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[self.file_of[name]].get_tensor(name)
        if tensor.dtype not in READABLE:
            raise UserError(
                f"{self.folder / self.file_of[name]}: {name} is {tensor.dtype}; only 16, 32 and "
                f"64 bit floating point is read; {FP8}"
            )
        return tensor

    def slice(self, name: str) -> Any:
        """Returns what gives boxes of a tensor, with `get_shape` and `get_dtype`."""
        return self.files[self.file_of[name]].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


def read_hf(
    folder: str | Path, notify: Callable[[str], object] = warnings.warn
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Reads the model in a Hugging Face folder.

    Args:
        folder: with config.json and safetensors files.
        notify: is called with a sentence on each thing that was accepted and left out, and on what
            transformers computes differently; by default it becomes a Python warning.

    Returns:
        the native config, which is valid as the `[model]` table of a recipe, and the native tensors
        by canonical name, in the dtypes of the files.

    Raises:
        UserError: a file is missing or broken, or holds something that the native model cannot
            represent; the message names the file and the field or tensor.
    """
    folder = Path(folder)
    hf_config = read_json(folder / CONFIG)
    family = family_in(folder, hf_config)

    def notify_of_folder(sentence: str) -> None:
        notify(f"{folder}: {sentence}")

    with ExitStack() as stack:
        try:
            config = family.config_from_hf(hf_config, notify_of_folder)
            shards = Shards(folder, stack)
            config = without_absent_mtp(family, config, shards, notify_of_folder)
            tensors = from_hf(family, config, shards)
        except Unsupported as error:
            raise UserError(f"{folder}: {error}") from None
        for sentence in unread_tensors(family, shards):
            notify_of_folder(sentence)
        return without_unused(config), tensors


def family_in(folder: Path, hf_config: Mapping[str, Any]) -> Family:
    """Returns the family that config.json names."""
    value = hf_config.get("architectures")
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], str):
        raise UserError(
            f"{folder / CONFIG}: architectures = {value!r}: must be a list with one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    try:
        return family_of(value[0])
    except Unsupported as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def read_index(folder: Path) -> dict[str, str] | None:
    """Returns the file of each tensor by the index, if all files exist; None for a single file."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        raise UserError(
            f"{folder} holds both {SINGLE} and {INDEX}; remove the one that does not belong"
        )
    if single.exists():
        return None
    if not index.exists():
        raise UserError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; other formats are not read: convert "
            "them to safetensors"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map from tensors to files; fetch it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: weight_map names {name!r}, which is no file beside it")
    missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
    if missing:
        raise UserError(
            f"{folder}: {', '.join(missing)} missing, which {INDEX} names; fetch the missing files"
        )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name a Hugging Face folder, with "
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
    """Writes a folder that transformers reads; it appears complete or not at all.

    Args:
        folder: must not exist yet.
        config: native.
        tensors: native, by canonical name; they are written in their dtypes.
        family: architecture, such as "LlamaForCausalLM"; None: the first that can represent the
            model.
        shard_bytes: largest size of a file, unless one tensor is larger.
        like: a Hugging Face folder, such as the one that the model was read from. Its tokenizer
            files, its bos, eos and pad tokens and its max_position_embeddings are copied. None: no
            tokenizer, no such tokens, and the number of positions before rotary scaling.

    Raises:
        UserError: the folder exists or cannot be written, or no family can represent the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder")
    try:
        table = family_for(config) if family is None else family_of(family)
        fields = table.config_to_hf(config)
        hf_tensors = to_hf(table, config, tensors)
        if like is not None:
            fields |= token_fields(Path(like), fields)
    except Unsupported as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    # Write beside the folder and rename: an interrupted call leaves no incomplete folder.
    temporary = folder.with_name(f"{folder.name}.coming-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary, hf_tensors, shard_bytes)
        write_config(temporary, fields, [tensor.dtype for tensor in hf_tensors.values()])
        for file in tokenizer_files(like):
            shutil.copyfile(file, temporary / file.name)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_files(like: str | Path | None) -> list[Path]:
    """Returns the files in a Hugging Face folder that belong to its tokenizer."""
    files = [] if like is None else [Path(like) / name for name in TOKENIZER]
    return [file for file in files if file.is_file()]


def token_fields(like: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the special tokens and the length in the config.json of the folder `like`.

    The length, max_position_embeddings, is left out if `fields` has a rotary scaling, which
    determines it.

    Raises:
        Unsupported: a special token is not in the vocabulary of the new model.
    """
    hf_config = read_json(like / CONFIG)
    copied = {name: hf_config.get(name) for name in TOKENS}
    for name, value in copied.items():
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not 0 <= token < fields["vocab_size"]:
                remedy = f"of {like}, but the model has {fields['vocab_size']} tokens"
                raise Unsupported(name, value, remedy)
    length = hf_config.get("max_position_embeddings")
    unscaled = not fields.get("rope_scaling") and isinstance(length, int)
    return copied | ({"max_position_embeddings": length} if unscaled else {})


def write_config(folder: Path, fields: Mapping[str, Any], dtypes: Iterable[torch.dtype]) -> None:
    """Writes config.json; the model's dtype is that of most of its tensors."""
    names = Counter(str(dtype).removeprefix("torch.") for dtype in dtypes)
    # null, or transformers uses its class's defaults
    tokens = dict.fromkeys(TOKENS)
    write_json(folder / CONFIG, {**tokens, **fields, "torch_dtype": names.most_common(1)[0][0]})


def write_index(folder: Path, file_of: Mapping[str, str], total: int) -> None:
    """Writes the index of several files: the file of each tensor, and the bytes of all."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(file_of)}
    write_json(folder / INDEX, index)


def file_names(count: int) -> list[str]:
    """Returns the names of that many safetensors files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def in_files(items: Iterable[T], bytes_of: Callable[[T], int], file_bytes: int) -> list[list[T]]:
    """Distributes items over files of at most `file_bytes`, or of one item, in their order."""
    files: list[list[T]] = [[]]
    size = 0
    for item in items:
        if files[-1] and size + bytes_of(item) > file_bytes:
            files.append([])
            size = 0
        files[-1].append(item)
        size += bytes_of(item)
    return files


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Writes one safetensors file, or several and their index."""
    files = in_files(tensors.items(), lambda item: item[1].nbytes, shard_bytes)
    file_of: dict[str, str] = {}
    for name, shard in zip(file_names(len(files)), files, strict=True):
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in shard}
        save_file(on_cpu, folder / name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(on_cpu, name)
    if len(files) > 1:
        write_index(folder, file_of, sum(tensor.nbytes for tensor in tensors.values()))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON, with a newline at its end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
