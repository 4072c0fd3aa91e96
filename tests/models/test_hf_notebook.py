"""The README's example of a folder, logits and a training loop; and models made in notebooks."""

from pathlib import Path

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from equal import assert_equal
from test_hf_dense import llama
from test_hf_moe import deepseek

from colonnade.launcher.convert.huggingface.folder import read_hf, write_hf
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.materialise import load_decoder, new_decoder


@pytest.mark.parametrize("build", [llama, deepseek], ids=["llama", "deepseek"])
def test_from_a_folder_to_a_loop(build, tmp_path: Path) -> None:
    hf_model = build()
    oracle.randomise(hf_model, seed=1)
    hf_model.save_pretrained(tmp_path / "model")
    config, tensors = read_hf(str(tmp_path / "model"), lambda sentence: None)
    original = {name: tensor.clone() for name, tensor in tensors.items()}
    model = load_decoder(config, tensors)
    assert_equal(dict(model.state_dict()), original)

    tokens = torch.randint(config.vocab, (13, 2), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:-1], tokens[1:]
    model.eval()
    with torch.no_grad():
        logits = model(inputs, Context.of_rows(inputs))
        expected = oracle.run_hf(hf_model, inputs).logits.transpose(0, 1)
    assert_equal({"logits": logits}, {"logits": expected})

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(5):
        model.begin_step()
        objective, report = model(inputs, Context.of_rows(inputs), labels)
        loss = objective / labels.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.end_step(report.loads)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(tensors[name], original[name]) for name in original)  # copied

    write_hf(str(tmp_path / "new"), config, model.state_dict(), like=tmp_path / "model")
    _, written = read_hf(tmp_path / "new", lambda sentence: None)
    assert all(torch.equal(written[name], model.state_dict()[name]) for name in written)


def test_a_model_without_weights_refuses_to_compute() -> None:
    config = ModelConfig(pattern="*-E", vocab=11, hidden=8, heads=2, ffn=6, experts=2)
    tokens = torch.zeros(3, 2, dtype=torch.long)
    with torch.device("meta"):
        model = Decoder(config)
    with pytest.raises(RuntimeError, match="no weights yet"):
        model(tokens, Context.of_rows(tokens))
    one, two, other = (new_decoder(config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_a_decoder_draws_its_initial_weights() -> None:
    """By PyTorch's generator, from the distributions of a run's initial weights."""
    config = ModelConfig(
        pattern="*-MmSDGET", vocab=300, hidden=64, heads=2, sigma_reparam=True, router_bias=True,
        mamba_head_dim=32, delta_key_dim=32,
    )  # fmt: skip
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(Decoder(config).state_dict())
    one, two, other = states
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    for name, first in new_decoder(config).state_dict().items():
        assert one[name].isfinite().all(), name
        if first.numel() > 500:
            assert torch.allclose(one[name].std(), first.std(), rtol=0.15), name


def test_the_error_for_a_missing_weight_names_it() -> None:
    config = ModelConfig(pattern="*-", vocab=11, hidden=8, heads=2, ffn=6)
    tensors = dict(new_decoder(config).state_dict())
    tensors.pop("final.weight")
    with pytest.raises(RuntimeError, match=r"final\.weight"):
        load_decoder(config, tensors)
    short = dict(new_decoder(config).state_dict()) | {"blocks.0.q": torch.zeros(3, 8)}
    with pytest.raises(RuntimeError, match=r"blocks\.0\.q is \(3, 8\), not \(8, 8\)"):
        load_decoder(config, short)
    model = new_decoder(config)
    result = model.load_state_dict(tensors, strict=False)
    assert result.missing_keys == ["final.weight"]
    assert next(iter(model.wiring.state_dict(prefix="a."))).startswith("a.")
    half = load_decoder(config, new_decoder(config).state_dict(), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
