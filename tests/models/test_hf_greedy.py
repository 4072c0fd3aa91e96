"""Greedy text of every Hugging Face architecture: with our cache as by transformers without one."""

import oracle
import pytest
import torch
from oracle import Case
from test_hf_families import ALL

from colonnade.launcher.generate.extending import Text, extend_texts
from colonnade.launcher.generate.sampling import Sampling
from colonnade.parallel.passes import Passes

LENGTH, PROMPT = 30, 5
FIRST: dict[str, Case] = {}
for one in ALL:
    FIRST.setdefault(one.oracle, one)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_greedy_text(case: Case) -> None:
    hf_model = case.build()
    config = oracle.native_config(hf_model)
    native = oracle.with_random_weights(config, hf_model, seed=1).double()
    prompt = torch.randint(0, config.vocab, (PROMPT,), generator=torch.Generator().manual_seed(2))
    text = Text(0, prompt.tolist())
    cpu = torch.device("cpu")
    extend_texts(Passes(native, cpu), [text], LENGTH, PROMPT + LENGTH, None, Sampling(0.0))
    # one pass suffices: it gives the token that follows each prefix of the text
    tokens = torch.tensor(text.prompt + text.generated)[:, None]
    with torch.no_grad():
        logits = oracle.run_hf(hf_model, tokens).logits[0]
    assert len(text.generated) == LENGTH
    assert text.generated == logits[PROMPT - 1 : -1].argmax(-1).tolist()
