"""`convert` in both directions: bit-exact, interrupted and repeated, in bounded memory."""

import errno
import json
import os
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from oracle import Case
from safetensors.torch import load_file
from test_hf_families import ALL
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from colonnade.launcher.checkpoint import load, manifest, verify
from colonnade.launcher.checkpoint.tensors import named_tensors
from colonnade.launcher.cli import main
from colonnade.launcher.convert.huggingface.entry import entry
from colonnade.launcher.convert.huggingface.folder import file_names, read_hf
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.weights import convert as convert_module
from colonnade.launcher.weights import direct, hf, native, stream, target
from colonnade.launcher.weights.convert import convert
from colonnade.launcher.weights.progress import Progress
from colonnade.launcher.weights.source import open_weights
from colonnade.models.context import Context


def ignore(sentence: str) -> None:
    """Takes no notice."""


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of all safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def random_box(shape: torch.Size, random: Random) -> tuple[slice, ...]:
    """Draws a box of at least one element."""
    starts = [random.randrange(size) for size in shape]
    ends = zip(starts, shape, strict=True)
    return tuple(slice(start, random.randint(start + 1, size)) for start, size in ends)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether these are the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in b
    )


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_family_comes_back(case: Case, tmp_path: Path) -> None:
    """Hugging Face to native to Hugging Face, in files of a kilobyte: every bit is as before, and
    what is read box by box is what is read whole."""
    with oracle.fp64():
        model = case.build()
    oracle.randomise(model, seed=5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="3KB")
    with mock.patch.object(native, "PART_BYTES", 256):  # most tensors are written in parts
        done = convert(
            tmp_path / "hf", tmp_path / "native", "native", file_bytes=1024, report=ignore
        )
    assert done.logits == 0.0
    config, expected = read_hf(tmp_path / "hf", ignore)
    boxes = Random(5)
    for folder in ("hf", "native"):
        with open_weights(tmp_path / folder, ignore) as weights:
            assert weights.config == config
            assert set(weights.shapes) == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(weights.whole(name), tensor), name
                box = random_box(tensor.shape, boxes)
                assert torch.equal(weights.read(name, box), tensor[box]), (name, box)
    family = type(model).__name__
    done = convert(
        tmp_path / "native", tmp_path / "back", "hf", family=family, file_bytes=1024, report=ignore
    )
    assert done.logits is not None  # transformers computes the same
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")
    if oracle.family(model).also_read:  # published under other names than transformers saves
        assert same_tensors(read_hf(tmp_path / "back", ignore)[1], expected)
        return
    copies = oracle.family(model).copies(config)
    assert set(before) - set(after) <= set(copies)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype


def test_transformers_loads_it_and_gives_our_logits(llama: Path, tmp_path: Path) -> None:
    """By the command line, in another dtype; our own checkpoint fills our own decoder."""
    native, back = str(tmp_path / "native"), str(tmp_path / "back")
    assert main(["convert", str(llama), native, "--to", "native", "--dtype", "fp64"]) == 0
    assert main(["convert", native, back, "--to", "hf"]) == 0
    recipe = load_recipe(Path(native) / "recipe.toml")
    model = oracle.empty(recipe.model)
    load(Path(native) / "checkpoints" / "step-00000000", named_tensors(model, None))
    hf_model = AutoModelForCausalLM.from_pretrained(back)
    assert hf_model.dtype == torch.float64
    tokens = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(1))
    ours = model(tokens.T, Context(torch.arange(9)[:, None]))[:, 0]
    with oracle.fp64(), torch.no_grad():
        theirs = hf_model(tokens).logits[0]
    assert (ours - theirs).abs().max() < 1e-9 * theirs.abs().max()


def test_an_interrupted_conversion_goes_on(llama: Path, tmp_path: Path) -> None:
    finish, written = direct.Output.finish, []

    def fail_at_the_third(self: direct.Output) -> Any:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(self)
        return finish(self)

    options = {"to": "native", "file_bytes": 2048, "report": ignore}
    with (
        mock.patch.object(direct.Output, "finish", fail_at_the_third),
        pytest.raises(UserError, match=r"No space left.*goes on behind the finished files"),
    ):
        convert(llama, tmp_path / "native", **options)
    assert not (tmp_path / "native").exists()
    with pytest.raises(UserError, match="another conversion"):
        convert(llama, tmp_path / "native", **(options | {"dtype": "bf16"}))
    with mock.patch.object(direct.Output, "finish", autospec=True, side_effect=finish) as again:
        done = convert(llama, tmp_path / "native", **options)
    assert done.kept == 2
    assert again.call_count == done.files - 2 > 2
    whole = convert(llama, tmp_path / "whole", **options)
    assert whole.kept == 0
    folder = Path("checkpoints") / "step-00000000"
    for path in (tmp_path / "whole" / folder).glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "native" / folder / path.name).read_bytes()
    verify(tmp_path / "native" / folder)
    assert not list(tmp_path.glob("*.coming"))


@pytest.mark.parametrize("to", ["hf", "native"])
def test_a_disk_that_fills_at_the_end(llama: Path, tmp_path: Path, to: str) -> None:
    """Behind the tensors' files: one sentence, and the same call goes on."""
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    room, name = {"hf": (hf, "write_config"), "native": (native, "write_manifest")}[to]
    with (
        mock.patch.object(room, name, side_effect=refused),
        pytest.raises(UserError, match=r"No space left.*goes on behind the finished files"),
    ):
        convert(llama, tmp_path / "out", to, report=ignore)
    assert not (tmp_path / "out").exists()
    convert(llama, tmp_path / "out", to, report=ignore)
    with open_weights(tmp_path / "out", ignore) as weights:
        for name, tensor in read_hf(llama, ignore)[1].items():
            assert torch.equal(weights.whole(name), tensor)


def test_a_finished_file_that_changed_is_written_again(llama: Path, tmp_path: Path) -> None:
    options = {"to": "hf", "file_bytes": 2048, "report": ignore}
    checks = Progress.check
    last = file_names(convert(llama, tmp_path / "whole", **options).files)[-1]

    def damage_last(self: Progress, name: str) -> None:
        path = self.folder / name
        if name == last:
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        checks(self, name)

    with (
        mock.patch.object(Progress, "check", damage_last),
        pytest.raises(UserError, match="is not what was written"),
    ):
        convert(llama, tmp_path / "copy", **options)
    done = convert(llama, tmp_path / "copy", **options)
    assert done.kept == done.files - 1
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_tensors_of_several_widths_are_aligned(tmp_path: Path) -> None:
    """Wide elements come first, so that a reader may use every tensor where it is."""
    values = {"a": torch.randn(3).bfloat16(), "b": torch.randn(2, 2), "c": torch.tensor(1.5)}
    values |= {"d": torch.randn(0, 4), "e": torch.randn(5).half(), "f": torch.randn(3).double()}
    pieces = [
        target.Piece(n, n, (0,) * t.dim(), tuple(t.shape), tuple(t.shape), t.dtype, lambda t=t: t)
        for n, t in values.items()
    ]
    records: list[Any] = []
    with stream.Stream() as writer:
        writer.write(tmp_path / "x", pieces, {"format": "pt"}, records.append)
    assert records == [manifest.checksums(tmp_path / "x")] == [direct.checksums(tmp_path / "x")]
    content = (tmp_path / "x").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    for name, tensor in values.items():
        assert (begin + header[name]["data_offsets"][0]) % tensor.itemsize == 0
    found = load_file(tmp_path / "x")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in values.items())


def test_memory_is_bounded(llama: Path, tmp_path: Path) -> None:
    """Between reading and writing are never more bytes than the bound, however large the file."""
    held: list[int] = []
    read = target.Piece.read

    def measured(self: target.Piece) -> torch.Tensor:
        held.append(streams[0].in_flight)
        return read(self)

    streams: list[stream.Stream] = []
    with (
        mock.patch.object(stream, "IN_FLIGHT", 4096),
        mock.patch.object(target.Piece, "read", measured),
        mock.patch.object(stream.Stream, "__enter__", lambda s: streams.append(s) or s),
    ):
        done = convert(llama, tmp_path / "native", "native", report=ignore)
    assert done.files == 1
    assert 0 < max(held) <= 4096 < done.bytes


@pytest.mark.parametrize("is_direct", [True, False])
def test_files_of_many_blocks(llama: Path, tmp_path: Path, is_direct: bool) -> None:
    """Tensors begin, end and lie within blocks, of which each is compared when it is read."""
    with ExitStack() as patched:
        for module in (manifest, direct):
            patched.enter_context(mock.patch.object(module, "BLOCK", 4096))
        flag = os.O_DIRECT if is_direct else 0
        patched.enter_context(mock.patch.object(os, "O_DIRECT", flag))
        patched.enter_context(mock.patch.object(direct, "POOLED", 0))  # memory is used again
        convert(llama, tmp_path / "native", "native", "fp64", report=ignore)
        (path,) = (tmp_path / "native").rglob("*.safetensors")
        assert path.stat().st_size > 5 * 4096
        verify(path.parent)
        convert(tmp_path / "native", tmp_path / "back", "hf", "fp32", report=ignore)
        before, after = tensors_in(llama), tensors_in(tmp_path / "back")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        damaged = bytearray(path.read_bytes())
        damaged[3 * 4096] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged .*between bytes 12,288 and 16,384"):
            convert(tmp_path / "native", tmp_path / "out", "hf", report=ignore)
        path.write_bytes(damaged[:-1])
        with pytest.raises(UserError, match="is damaged"):
            convert(tmp_path / "native", tmp_path / "other", "hf", report=ignore)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("other*"))


def test_memory_is_used_again_only_when_its_tensor_is_gone() -> None:
    pool = direct.Pool()
    first, second = (pool.memory(direct.POOLED) for _ in range(2))
    place, rest = first.data_ptr(), first[5:]
    assert place != second.data_ptr()
    del first
    third = pool.memory(direct.POOLED)
    assert third.data_ptr() != place
    del rest
    assert pool.memory(direct.POOLED).data_ptr() == place


def test_a_source_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    """The error names the file of the source, not the destination."""
    failed = mock.patch.object(direct, "read_into", side_effect=OSError(errno.EIO, "I/O error"))
    with failed, pytest.raises(UserError, match=r"llama/model.safetensors cannot be read"):
        convert(llama, tmp_path / "out", "native", report=ignore)


def test_tensors_at_odd_places(llama: Path, tmp_path: Path) -> None:
    """safetensors aligns tensors, and other writers need not."""
    path = llama / "model.safetensors"
    expected = {name: tensor.clone() for name, tensor in load_file(path).items()}
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    spaced = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" "
    path.write_bytes(spaced + content[8 + length :])
    convert(llama, tmp_path / "out", "hf", report=ignore)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "out", "--to", "hf"], "neither a run with a checkpoint"),
        (["llama", "llama", "--to", "hf"], "exists already"),
        (["llama", "out", "--to", "hf", "--family", "MambaForCausalLM"], "must be one of 'm'"),
        (["llama", "out", "--to", "native", "--family", "LlamaForCausalLM"], "leave it out"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
    assert not Path("out.coming").exists()


def test_what_no_class_has_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    """A soft cap on scores is an option that no family has."""
    convert(llama, tmp_path / "native", "native", report=ignore)
    recipe = tmp_path / "native" / "recipe.toml"
    text = recipe.read_text()
    assert "attention_cap" not in text
    recipe.write_text(text.replace("[model]", "[model]\nattention_cap = 5.0"))
    with pytest.raises(UserError, match=r"attention_cap = 5.0: no Hugging Face class"):
        convert(tmp_path / "native", tmp_path / "out", "hf", report=ignore)
    assert not list(tmp_path.glob("out*"))


def test_the_tokenizer_goes_along(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    convert(llama, tmp_path / "native", "native", report=ignore)
    recipe = load_recipe(tmp_path / "native" / "recipe.toml")
    assert recipe.data.tokenizer == str(tmp_path / "native" / "tokenizer")
    convert(tmp_path / "native", tmp_path / "back", "hf", report=ignore)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (llama, tmp_path / "back")
    )
    for field in ("bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert after[field] == before[field] is not None


def test_a_model_of_bytes_stays_one(tmp_path: Path) -> None:
    """A run whose text was read as bytes, by default."""
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "run", "native", report=ignore)
    recipe = Recipe(name="run", model=load_recipe(tmp_path / "run" / "recipe.toml").model)
    (tmp_path / "run" / "recipe.toml").write_text(dump_recipe(recipe))
    convert(tmp_path / "run", tmp_path / "native", "native", report=ignore)
    assert load_recipe(tmp_path / "native" / "recipe.toml").data.tokenizer == "bytes"


def test_a_native_folder_that_was_complete_goes_on_there(llama: Path, tmp_path: Path) -> None:
    """An interruption behind the files of tensors, as while logits are compared."""
    fails = mock.patch.object(convert_module, "compare", side_effect=KeyboardInterrupt)
    with fails, pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "out", "native", file_bytes=1024, report=ignore)
    done = convert(llama, tmp_path / "out", "native", file_bytes=1024, report=ignore)
    assert done.kept == done.files > 1


def test_a_source_that_cannot_be_opened_is_named(llama: Path, tmp_path: Path) -> None:
    open_direct = direct.open_direct

    def refuse_source(path: Path, flags: int) -> int:
        if path.parent == llama:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_direct(path, flags)

    message = r"llama/model.safetensors cannot be read \(Too many open files\)"
    refused = mock.patch.object(direct, "open_direct", refuse_source)
    with refused, pytest.raises(UserError, match=message):
        convert(llama, tmp_path / "out", "native", report=ignore)


def test_boxes_of_packed_experts_read_only_them() -> None:
    shapes = {"gate": torch.Size((6, 4, 3)), "up": torch.Size((6, 4, 3))}
    one = entry("gate_up", "gate", "up", dim=1, groups=4, transposed=True)
    packed = one.join({n: torch.randn(shape) for n, shape in shapes.items()})["gate_up"]
    asked = []

    class Source:
        def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
            asked.append(packed[box].numel())
            return packed[box]

    box = (slice(2, 4), slice(1, 3), slice(0, 3))
    found = one.read("up", box, shapes, lambda name: Source())
    assert torch.equal(found, one.split([packed], shapes)["up"][box])
    assert asked == [2 * 8 * 3]
