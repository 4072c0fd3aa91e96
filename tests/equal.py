"""What «equal» means: |a - b| <= 1e-9 max|b| + 1e-12 ‖all of b‖, in fp64."""

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_equal(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], relative: float = 1e-9, of_all: float = 1e-12
) -> None:
    """Every tensor of `a` equals that of `b`; the worst one is named."""
    assert a.keys() == b.keys(), f"only in one: {sorted(a.keys() ^ b.keys())}"
    whole = torch.stack([t.double().norm() for t in b.values()]).norm()
    excess = {}
    for name in b:
        x, y = a[name].double(), b[name].double()
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)} and {tuple(y.shape)}"
        if y.numel():
            bound = relative * y.abs().max() + of_all * whole
            excess[name] = float((x - y).abs().max() / bound) if (x != y).any() else 0.0
            assert x.isfinite().all(), f"{name} is not finite"
    worst = max(excess, key=excess.__getitem__)
    assert excess[worst] <= 1, f"{worst} differs by {excess[worst]:.3g} times the bound"
