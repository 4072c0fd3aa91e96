"""A script that measures errors of the chunked delta rule and its recurrence against 80 bits.

python tests/kernels/conditioning.py        a line per case, for EXPERIMENTS.md

The error of a tensor is that of its worst element relative to its largest element, as the geometric
mean over three seeds. A line gives the recurrence's worst tensor, and for every chunk size the
tensor whose error is the largest multiple of the recurrence's.
"""

from itertools import product
from math import exp, log

import numpy as np
import torch
import torch.nn.functional as F
from scans import results
from torch import Tensor

from colonnade.kernels.delta import delta_rule, delta_rule_recurrence

CHUNKS = (2, 4, 16, 64)
Arrays = dict[str, np.ndarray]


def exact(t: dict[str, Tensor]) -> Arrays:
    """The recurrence and its gradients for the same output gradients as `results`, in 80 bits."""
    w = {name: v.double().numpy().astype(np.longdouble) for name, v in t.items()}
    q, k, v, beta, before = w["q"], w["k"], w["v"], w["beta"], w["initial_state"]
    gates = np.exp(w.get("decay", np.zeros_like(beta)))
    states, decayed, errors, outputs = [before], [], [], []
    for i in range(len(q)):
        s = gates[i][..., None, None] * states[-1]
        e = v[i] - read(s, k[i])
        decayed.append(s)
        errors.append(e)
        states.append(s + outer(k[i], beta[i][..., None] * e))
        outputs.append(read(states[-1], q[i]))
    g = torch.Generator().manual_seed(1)
    shapes = (v.shape, before.shape)
    do, ds = (torch.randn(s, generator=g).bfloat16().double().numpy() for s in shapes)
    ds = ds.astype(np.longdouble)
    grads = {name: np.zeros_like(w[name]) for name in w if name != "initial_state"}
    for i in reversed(range(len(q))):
        grads["q"][i] = (states[i + 1] * do[i][..., None, :]).sum(-1)
        ds = ds + outer(q[i], do[i])
        dd = read(ds, k[i])
        grads["beta"][i] = (dd * errors[i]).sum(-1)
        grads["v"][i] = beta[i][..., None] * dd
        grads["k"][i] = (ds * (beta[i][..., None] * errors[i])[..., None, :]).sum(-1)
        grads["k"][i] -= (decayed[i] * grads["v"][i][..., None, :]).sum(-1)
        ds = ds - outer(k[i], grads["v"][i])
        if "decay" in grads:
            grads["decay"][i] = (ds * decayed[i]).sum((-1, -2))
        ds = gates[i][..., None, None] * ds
    named = {f"d{name}": d for name, d in grads.items()} | {"dinitial_state": ds}
    return {"y": np.stack(outputs), "state": states[-1], **named}


def read(state: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Sᵀ k."""
    return (state * key[..., None]).sum(-2)


def outer(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """k vᵀ."""
    return key[..., None] * value[..., None, :]


def inputs(S: int, P: int, keys: str, beta: str, gated: bool, seed: int) -> dict[str, Tensor]:
    """Two samples of four heads; `keys` and `beta` as the printed lines name them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    k = normal(S, 2, 4, P)
    kinds = {"one": k[:1].expand_as(k), "two": k[:2].repeat(S // 2, 1, 1, 1)}
    kinds |= {"near": k[:1] + 1e-3 * k, "positive": k.abs(), "random": k}
    logit = normal(S, 2, 4)
    rates = {"below 1": logit.sigmoid(), "below 2": 2 * logit.sigmoid()}
    rates |= {"0 or 2, nearly": 2 * (4 * logit).sigmoid(), "2": torch.full_like(logit, 2.0)}
    t = {"q": F.normalize(normal(S, 2, 4, P), dim=-1) * P**-0.5, "v": normal(S, 2, 4, 4)}
    t |= {"k": F.normalize(kinds[keys], dim=-1), "beta": rates[beta]}
    t["initial_state"] = normal(2, 4, P, 4)
    return t | {"decay": F.logsigmoid(normal(S, 2, 4) + 2)} if gated else t


def errors(got: dict[str, Tensor], truth: Arrays) -> dict[str, float]:
    """Each tensor's largest error relative to its largest element."""
    return {
        name: float(abs(got[name].double().numpy() - b).max() / abs(b).max())
        for name, b in truth.items()
    }


def mean(draws: list[dict[str, float]]) -> dict[str, float]:
    """Geometric means by name."""
    return {n: exp(sum(log(max(d[n], 1e-30)) for d in draws) / len(draws)) for n in draws[0]}


def line(dtype: torch.dtype, S: int, P: int, keys: str, beta: str, gated: bool) -> str:
    """The printed line of one case."""
    plain: list[dict[str, float]] = []
    chunked: dict[int, list[dict[str, float]]] = {Q: [] for Q in CHUNKS}
    for seed in range(3):
        t = {n: v.to(dtype) for n, v in inputs(S, P, keys, beta, gated, seed).items()}
        truth = exact(t)
        plain.append(errors(results(delta_rule_recurrence, t), truth))
        for Q, draws in chunked.items():
            draws.append(errors(results(delta_rule, t, chunk=Q), truth))
    base = mean(plain)
    words = [f"{dtype} S {S} P {P} keys {keys}, beta {beta}, {'G' if gated else 'D'}:"]
    words.append(f"recurrence {max(base.values()):.0e}")
    for Q, draws in chunked.items():
        chunk = mean(draws)
        worst = max(chunk, key=lambda n: chunk[n] / base[n])
        words.append(f"| Q {Q} {chunk[worst] / base[worst]:.1f} x ({worst} {chunk[worst]:.0e})")
    return " ".join(words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sizes, kinds = ((32, 4), (512, 4), (512, 64)), ("random", "positive", "near", "one", "two")
    rates = ("below 1", "below 2", "0 or 2, nearly", "2")
    for dtype, (S, P), keys, beta, gated in product(
        (torch.float32, torch.float64), sizes, kinds, rates, (False, True)
    ):
        print(line(dtype, S, P, keys, beta, gated), flush=True)
