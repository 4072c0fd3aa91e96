"""A router gets a gradient from the loss with any top k."""

import torch
from oracle import empty, randomise

from colonnade.models.config import ModelConfig
from colonnade.models.context import Context


def config(top_k: int) -> ModelConfig:
    return ModelConfig(
        pattern="E", hidden=12, ffn=16, vocab=19, experts=4, top_k=top_k, balance=0.0
    )


def test_router_learns_from_the_loss_whatever_top_k() -> None:
    tokens = torch.randint(0, 19, (7, 2), generator=torch.Generator().manual_seed(0))
    for top_k in (1, 2, 3):
        model = empty(config(top_k))
        with torch.no_grad():
            randomise(model, 1)
        context = Context(torch.arange(7)[:, None].expand(7, 2))
        objective, report = model(tokens, context, tokens.roll(-1, 0))
        objective.backward()
        assert model.wiring.block(0).small.router.grad.norm() > 1e-3, top_k
        assert not report.terms
