"""Fixtures of the tests of layers."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.layers import LAYERS, Model


@pytest.fixture(params=LAYERS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Any]:
    build, x = LAYERS[request.param]
    torch.manual_seed(0)
    return Model(build()).double(), x
