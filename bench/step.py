"""`bench step`: a training step of a small Llama, ours beside Hugging Face's LlamaForCausalLM.

Each runs in a separate process, so that each has its own peak memory, and they take turns step by
step. Ours is set up as `train` does it, with glibc keeping freed memory. The floor is the time of
the reference's matrix products, attention and AdamW only.
"""

import importlib
import multiprocessing
import os
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.bench.timing import alternate, median_ratio
from colonnade.launcher.cluster.environment import cores
from colonnade.launcher.cluster.memory import resident_mib
from colonnade.launcher.errors import UserError
from colonnade.models.config import ModelConfig

SHAPE = ModelConfig(pattern="*-", repeat=4, hidden=512, heads=8, kv_heads=4, ffn=1408, vocab=8192)
BATCH, SEQ = 4, 512

Step = Callable[[], object]


def colonnade_step(tokens: Tensor) -> Step:
    """Builds our decoder with fused AdamW, set up as `train` does it; returns its training step."""
    from colonnade.launcher.cluster.products import settle_products
    from colonnade.launcher.cluster.ranks import settle_memory
    from colonnade.launcher.recipe.tables import OptimizerConfig
    from colonnade.models.context import Context
    from colonnade.models.decoder import Decoder
    from colonnade.parallel.materialise import materialise
    from colonnade.parallel.optimizer import build_optimizer

    settle_memory(torch.device("cpu"))
    settle_products(torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(SHAPE, loss_chunk=256)
    materialise(model, torch.device("cpu"), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig())
    inputs = tokens.T.contiguous()
    labels = F.pad(inputs[1:], (0, 0, 0, 1), value=-100)
    positions = torch.arange(SEQ)[:, None].expand(SEQ, BATCH)

    def step() -> None:
        loss = model(inputs, Context(positions), labels)[0] / (BATCH * (SEQ - 1))
        loss.backward()
        optimizer.step(1e-3)
        optimizer.zero_grad()

    return step


def reference_step(tokens: Tensor) -> Step:
    """Builds Hugging Face's Llama of the same shape with fused AdamW; returns its step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE.hidden,
            intermediate_size=SHAPE.ffn,
            num_hidden_layers=SHAPE.repeat,
            num_attention_heads=SHAPE.heads,
            num_key_value_heads=SHAPE.kv_heads,
            vocab_size=SHAPE.vocab,
            max_position_embeddings=SEQ,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_step(tokens: Tensor) -> Step:
    """Builds the matrix products, attention and AdamW of that step, and nothing else of it.

    All are PyTorch's own.
    """
    T, D, kv = BATCH * SEQ, SHAPE.hidden, SHAPE.hidden * (SHAPE.kv_heads or 1) // SHAPE.heads
    widths = [(D, D), (D, kv), (D, kv), (D, D), (D, SHAPE.ffn), (D, SHAPE.ffn), (SHAPE.ffn, D)]
    products = [(torch.randn(T, i), torch.randn(o, i)) for i, o in widths] * SHAPE.repeat
    products.append((torch.randn(T, D), torch.randn(SHAPE.vocab, D)))
    q = torch.randn(BATCH, SHAPE.heads, SEQ, D // SHAPE.heads, requires_grad=True)
    kv_shape = BATCH, SHAPE.kv_heads or 1, SEQ, D // SHAPE.heads
    k = torch.randn(kv_shape, requires_grad=True)
    v = torch.randn(kv_shape, requires_grad=True)
    weights = [torch.randn_like(w).requires_grad_() for _, w in products]
    weights.append(torch.randn(SHAPE.vocab, D, requires_grad=True))
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer = torch.optim.AdamW(weights, fused=True)

    def step() -> None:
        for x, w in products:
            y = x @ w.T
            y @ w
            y.T @ x
        for _ in range(SHAPE.repeat):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, (q, k, v), out)
        optimizer.step()

    return step


# Imported before memory is first measured; optimizers import torch._dynamo when constructed.
IMPORTS = {
    "ours": (
        "torch._dynamo",
        "colonnade.models.decoder",
        "colonnade.parallel.optimizer",
        "colonnade.launcher.cluster.ranks",
    ),
    "reference": ("torch._dynamo", "transformers.models.llama.modeling_llama"),
    "floor": ("torch._dynamo",),
}
CANDIDATES = {"ours": colonnade_step, "reference": reference_step, "floor": floor_step}


def worker_main(name: str, threads: int, pipe: Connection) -> None:
    """Runs in a candidate's process: makes one step per request.

    It answers with its peak memory, and with the memory after the imports, in MiB.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for module in IMPORTS[name]:
        importlib.import_module(module)
    before = resident_mib()
    step = CANDIDATES[name](torch.randint(0, SHAPE.vocab, (BATCH, SEQ)))
    while pipe.recv():
        step()
        pipe.send((resident_mib(), before))


def run(rounds: int = 15) -> dict[str, Any]:
    """Medians over alternating steps: tokens/s, peak memory, their ratios, and the floor.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as missing:
        raise UserError(
            "bench step compares with transformers: pip install 'colonnade[bench]'"
        ) from missing
    threads = cores()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a waiting process must not spin
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in CANDIDATES:
        pipes[name], worker_pipe = context.Pipe()
        arguments = name, threads, worker_pipe
        workers.append(context.Process(target=worker_main, args=arguments, daemon=True))
        workers[-1].start()
    memory: dict[str, tuple[float, float]] = {}  # peak, and after the imports; MiB

    def request_step(name: str) -> Callable[[], None]:
        def action() -> None:
            pipes[name].send(True)
            memory[name] = pipes[name].recv()

        return action

    seconds = alternate({name: request_step(name) for name in CANDIDATES}, rounds, warmup=2)
    for name, worker in zip(CANDIDATES, workers, strict=True):
        pipes[name].send(False)
        worker.join()
    tokens = BATCH * SEQ
    rise = {name: peak - before for name, (peak, before) in memory.items()}
    return {
        "shape": f"4 layers, hidden 512, sequence {SEQ}, batch {BATCH}, fp32, {threads} threads",
        **{f"{n} tokens/s": tokens / statistics.median(s) for n, s in seconds.items()},
        "speed, ours / reference": median_ratio(seconds["reference"], seconds["ours"]),
        "speed, floor / reference": median_ratio(seconds["reference"], seconds["floor"]),
        "ours peak MiB": memory["ours"][0],
        "reference peak MiB": memory["reference"][0],
        "memory, ours / reference": memory["ours"][0] / memory["reference"][0],
        "ours MiB above imports": rise["ours"],
        "reference MiB above imports": rise["reference"],
        "memory above imports, ours / reference": rise["ours"] / rise["reference"],
    }
