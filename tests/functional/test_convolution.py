"""A frozen convolution with packed copies computes what torch's own does."""

import itertools

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.functional import products
from lightning_lora.functional.convolution import Geometry, frozen_convolution
from lightning_lora.functional.packing import PackedWeight

pytestmark = pytest.mark.skipif(not products._has_operators(), reason="this torch has no oneDNN")

CL = torch.channels_last

GEOMETRIES = {
    "3 × 3": (Geometry((1, 1), (1, 1), (1, 1), 1), 3),
    "stride 2": (Geometry((2, 2), (1, 1), (1, 1), 1), 3),
    "of size 1": (Geometry((1, 1), (0, 0), (1, 1), 1), 1),
    "dilated": (Geometry((1, 1), (2, 2), (2, 2), 1), 3),
    "groups": (Geometry((3, 3), (1, 1), (1, 1), 2), 4),
    "depthwise": (Geometry((1, 1), (1, 1), (1, 1), 8), 3),
    "uneven": (Geometry((2, 1), (1, 2), (1, 1), 1), 3),
}


def case(geometry: Geometry, size: int, *, images: tuple[int, ...] = (2, 14, 15)) -> list[Tensor]:
    torch.manual_seed(0)
    count, height, width = images
    x = torch.randn(count, 8, height, width).contiguous(memory_format=CL).requires_grad_()
    weight = torch.randn(16, 8 // geometry.groups, size, size)
    return [x, weight, torch.randn(16, requires_grad=True)]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_outputs_and_gradients_are_torchs_own_up_to_rounding(geometry: tuple[Geometry, int]) -> None:
    moves, size = geometry
    packed = PackedWeight()
    for images, laid_out in itertools.product([(2, 14, 15), (1, 15, 14), (5, 16, 17)], ["weight", "channels last"]):
        x, weight, bias = case(moves, size, images=images)
        weight = weight if laid_out == "weight" else weight.contiguous(memory_format=CL)
        found, expected = frozen_convolution(x, weight, bias, moves, packed), F.conv2d(x, weight, bias, *moves)
        assert found is not None and found.stride() == expected.stride()
        assert (found - expected).norm() <= 4 * torch.finfo(torch.float32).eps * expected.norm()
        for grad in (torch.randn_like(expected), torch.randn_like(expected).contiguous()):
            pairs = zip(
                *(torch.autograd.grad(y, (x, bias), grad, retain_graph=True) for y in (found, expected)), strict=True
            )
            for one, other in pairs:
                assert one.stride() == other.stride()
                assert (one - other).norm() <= 16 * torch.finfo(torch.float32).eps * other.norm()


def test_it_has_second_derivatives_and_may_be_changed_in_place() -> None:
    moves, size = GEOMETRIES["stride 2"]
    x, weight, bias = case(moves, size)
    results = []
    for convolve in (
        lambda: frozen_convolution(x, weight, bias, moves, PackedWeight()),
        lambda: F.conv2d(x, weight, bias, *moves),
    ):
        output = F.relu_(convolve())
        first = torch.autograd.grad(output.square().sum(), (x, bias), create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, bias))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    moves, size = GEOMETRIES["3 × 3"]
    x, weight, bias = case(moves, size)
    pixel = torch.randn(4, 8, 1, 1)
    others = {
        "not channels last": (x.detach().contiguous(), weight, bias),
        "of one pixel, which has no format": (pixel.contiguous(memory_format=CL), weight, bias),
        "one image without a batch": (x[0], weight, bias),
        "half": (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        "double": (x.double(), weight.double(), bias.double()),
        "dtypes that do not fit": (x, weight.bfloat16(), bias),
        "a trained kernel": (x, nn.Parameter(weight), bias),
        "another device": (x.to("meta"), weight.to("meta"), bias.to("meta")),
    }
    for about, tensors in others.items():
        packed = PackedWeight()
        assert frozen_convolution(*tensors, moves, packed) is None and not packed.is_filled, about
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_convolution(x, weight, bias, moves, PackedWeight()) is None
    monkeypatch.setattr(products, "_has_operators", lambda: False)
    assert frozen_convolution(x, weight, bias, moves, PackedWeight()) is None


def test_a_changed_kernel_is_noticed() -> None:
    moves, size = GEOMETRIES["3 × 3"]
    x, weight, bias = case(moves, size)
    packed = PackedWeight()
    output = frozen_convolution(x, weight, bias, moves, packed)
    assert output is not None
    weight.mul_(2)
    again = frozen_convolution(x, weight, bias, moves, packed)
    assert again is not None
    torch.testing.assert_close(again, F.conv2d(x, weight, bias, *moves), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_autocast_around_the_backward_pass_rounds_nothing() -> None:
    moves, size = GEOMETRIES["3 × 3"]
    x, weight, bias = case(moves, size)
    results = []
    for output in (frozen_convolution(x, weight, bias, moves, PackedWeight()), F.conv2d(x, weight, bias, *moves)):
        assert output is not None
        loss = output.square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(torch.autograd.grad(loss, (x, bias), retain_graph=True))
            results.append(torch.autograd.grad(loss, (x, bias), create_graph=True))
    for found in results[:2]:
        for one, other in zip(found, results[2], strict=True):
            assert (one - other).norm() <= 16 * torch.finfo(torch.float32).eps * other.norm()
