"""GradientAccumulator.gradient_noise_scale: McCandlish et al. 2018, appendix A.1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_ext import GradientAccumulator


def test_gradient_noise_scale_of_a_known_distribution() -> None:
    # The gradient of each example is `mean` plus noise of covariance `deviation ** 2 * identity`.
    dim, mean, deviation = 64, 0.5, 2.0
    parameter = nn.Parameter(torch.zeros(dim))
    model = nn.ParameterList([parameter])
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert accumulator.gradient_noise_scale.isnan()
    for _ in range(60):
        for size in (4, 2, 6, 4):
            with accumulator.micro_batch(weight=size):
                examples = mean + deviation * torch.randn(size, dim)
                (examples * parameter).sum().backward()
        accumulator.step()
    expected = dim * deviation**2 / (dim * mean**2)
    assert accumulator.gradient_noise_scale.item() == pytest.approx(expected, rel=0.25)


def test_gradient_noise_scale_is_the_formula() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    model = nn.ParameterList([parameter])
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    gradients = [torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, 1.0])]
    for gradient, weight in zip(gradients, (2, 4), strict=True):
        with accumulator.micro_batch(weight=weight):
            (gradient * parameter).sum().backward()
    accumulator.step()
    small = (gradients[0] / 2).square().sum().item()
    large = ((gradients[0] + gradients[1]) / 6).square().sum().item()
    signal = (6 * large - 2 * small) / (6 - 2)
    noise = (small - large) / (1 / 2 - 1 / 6)
    assert accumulator.gradient_noise_scale.item() == pytest.approx(noise / signal, rel=1e-5)
    # A window that is skipped does not count.
    for value in (1.0, float("inf")):
        with accumulator.micro_batch():
            (value * parameter).sum().backward()
    accumulator.step()
    assert accumulator.gradient_noise_scale.item() == pytest.approx(noise / signal, rel=1e-5)
