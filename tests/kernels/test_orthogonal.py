"""Newton-Schulz iteration against singular values."""

import pytest
import torch
from equal import assert_equal

from colonnade.kernels.orthogonal import orthogonalised, orthogonalised_reference


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (9, 4), (2, 3, 6, 4), (1, 7)])
def test_orthogonalised(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = orthogonalised(x)
    assert_equal({"": y}, {"": orthogonalised_reference(x)}, 1e-10)
    assert y.shape == x.shape
    # It approximates the polar factor: singular values that are not tiny become about 1.
    S = torch.linalg.svdvals(y)
    assert ((S > 0.6) & (S < 1.3)).all()


def test_zero_and_scale() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert not orthogonalised(torch.zeros(4, 6)).any()
    assert_equal({"": orthogonalised(1e3 * x)}, {"": orthogonalised(x)}, 1e-10)
