"""A Conv1D of transformers with random values."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def conv1d() -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(7, 12)  # 12 inputs, 7 outputs
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer
