"""Approximate orthogonalisation of a matrix by Newton-Schulz iteration, as Muon uses it."""

import torch
from torch import Tensor

# x -> a x + b x³ + c x⁵: steep at 0, and near 1 it stays between 0.7 and 1.2 (K. Jordan, 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7  # lower bound of the norm by which a matrix is divided


def orthogonalised(x: Tensor) -> Tensor:
    """U f(S) Vᵀ of x = U S Vᵀ, where f brings all but the smallest singular values near 1.

    Args:
        x: `[..., rows, columns]`, a matrix or several, in the dtype of the products.

    Returns:
        the shape and dtype of `x`; zero where `x` is.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x  # so that the Gram matrix is the smaller one
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y


def orthogonalised_reference(x: Tensor) -> Tensor:
    """`orthogonalised` by its formula on singular values, of one matrix or several."""
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    S = S / torch.linalg.vector_norm(S, dim=-1, keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        S = a * S + b * S**3 + c * S**5
    return U * S[..., None, :] @ V
