"""The interaction's own backward equals autograd's, at every order and in every mode."""

from __future__ import annotations

import pytest
import torch

from recsys_edu.models.dlrm import InteractionArch, pair_positions, pair_products


def by_autograd(vectors_BVD: torch.Tensor) -> torch.Tensor:
    products = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2)).flatten(1)
    return products[:, pair_positions(vectors_BVD.shape[1], vectors_BVD.device)]


@pytest.mark.parametrize("shape", [(3, 2, 4), (5, 7, 8), (0, 3, 4), (1, 27, 64)])
def test_gradient_equals_autograds(shape):
    vectors = torch.randn(shape, requires_grad=True)
    gradient = torch.randn_like(by_autograd(vectors))
    torch.testing.assert_close(pair_products(vectors), by_autograd(vectors))
    (ours,) = torch.autograd.grad(pair_products(vectors), vectors, gradient)
    (expected,) = torch.autograd.grad(by_autograd(vectors), vectors, gradient)
    torch.testing.assert_close(ours, expected)


def test_first_and_second_derivative_by_finite_differences():
    vectors = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pair_products, vectors)
    assert torch.autograd.gradgradcheck(pair_products, vectors)


def test_under_autocast():
    vectors = torch.randn(2, 3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = pair_products(vectors)
    products.float().sum().backward()
    assert products.dtype == torch.bfloat16 and vectors.grad.dtype == torch.float32
    other_vectors_sum = vectors.detach().sum(1, keepdim=True) - vectors.detach()
    torch.testing.assert_close(vectors.grad, other_vectors_sum, rtol=0.02, atol=0.02)


def test_export_and_trace_keep_the_answer():
    dense, sparse = torch.randn(4, 8), torch.randn(4, 3, 8)
    module = InteractionArch(3)
    expected = module(dense, sparse)
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(dense, sparse), expected)
    torch.testing.assert_close(torch.export.export(module, (dense, sparse)).module()(dense, sparse), expected)
