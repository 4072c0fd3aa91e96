"""The choice of a library for fp32 products: measured, cached, and measured again elsewhere."""

from pathlib import Path

import pytest
import torch

from colonnade.kernels.linear import CLASSES, prefer, preferred
from colonnade.launcher.cluster import products
from colonnade.launcher.cluster.products import cached_choice, measure_choice, settle_products


def test_a_choice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ratios = iter([2.0, 0.5, 1.08] * 3)
    monkeypatch.setattr(products, "_mkl_over_onednn", lambda a, b: next(ratios))
    before = preferred()
    chosen = [True, False, False] * 3  # the last is too close to call
    expected = dict(zip(sorted(CLASSES, key=size_first), chosen, strict=True))
    try:
        settle_products(torch.device("cpu"))
        assert preferred() == expected
        settle_products(torch.device("cpu"))  # which would raise StopIteration
        assert cached_choice() == expected
    finally:
        prefer(before)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert cached_choice() is None
    (file,) = (tmp_path / "colonnade").iterdir()
    file.write_text("{}")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert cached_choice() is None


def size_first(name: str) -> int:
    """The order in which classes are measured."""
    layout, _, size = name.partition(", ")
    sizes, layouts = list(products.SIZES), list(products.LAYOUTS)
    return sizes.index(size) * len(layouts) + layouts.index(layout)


def test_a_choice_is_measured_without_a_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colonnade").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "ROUNDS", 1)
    assert set(measure_choice()) == set(CLASSES)
