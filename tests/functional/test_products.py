"""A layer that trains multiplies by its frozen weight in the fastest form, and evaluation in torch's own."""

import copy
import pickle
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_lora.functional import products
from lightning_lora.functional.linear import adapted_linear
from lightning_lora.functional.packing import PackedWeight
from lightning_lora.functional.products import (
    BY_ONEDNN,
    BY_TORCH,
    FEW_ROWS,
    ROWS_TO_COPY,
    has_amx,
    is_amd,
    products_for,
)
from tests.functional.cases import PACKS_BFLOAT16, composed, goes_by_hand, inputs

needs_onednn = pytest.mark.skipif(not products._has_operators(), reason="this torch has no oneDNN")


@pytest.fixture
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_amd", lambda: True)


def case(*shape: int, dtype: torch.dtype = torch.float32, **sizes: int) -> list[Tensor]:
    """x, W, b, A, B, of which W and b are frozen."""
    x, weight, bias, a, b = inputs(*shape, dtype=dtype, **sizes)
    return [x, weight.detach(), bias.detach(), a, b]


FORMS: dict[str, tuple[torch.dtype, Callable[[], dict[str, Any]]]] = {
    "oneDNN": (torch.float32, lambda: {"training": True}),
    "packed float32": (torch.float32, lambda: {"packed": PackedWeight()}),
    "packed bfloat16": (torch.bfloat16, lambda: {"packed": PackedWeight()}),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, on_amd: None) -> tuple[torch.dtype, dict[str, Any]]:
    dtype, options = FORMS[request.param]
    if dtype is torch.bfloat16 and not PACKS_BFLOAT16:
        pytest.skip("linear layers in bfloat16 are not packed on this processor")
    return dtype, options()


# Values and gradients


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [4, 7, 400])
def test_every_form_computes_the_same_values_and_gradients(
    form: tuple[torch.dtype, dict[str, Any]], tokens: int, dropout: float
) -> None:
    dtype, options = form
    torch.manual_seed(0)
    tensors = case(4, tokens, 24, out=20, dtype=dtype)
    assert products_for(*tensors[:2], options.get("packed")) is not BY_TORCH
    grad = torch.randn(4, tokens, 20, dtype=dtype)
    results = []
    for each in (options, {}):
        torch.manual_seed(3)
        output = adapted_linear(*tensors, 0.7, dropout, **each)
        assert goes_by_hand(output) and not output._is_view()
        wanted = [tensors[0], *tensors[3:]]
        results.append([output, *torch.autograd.grad(output, wanted, grad)])
    for one, other in zip(*results, strict=True):
        assert one.dtype is other.dtype is dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)


def test_every_form_takes_inputs_and_weights_however_they_are_laid_out(
    form: tuple[torch.dtype, dict[str, Any]],
) -> None:
    dtype, options = form
    _, weight, bias, a, b = case(5, 24, out=20, dtype=dtype)
    x = torch.randn(3, 32, 24, dtype=dtype)
    layouts = [
        x,
        x.transpose(0, 1),
        x[:, ::2],
        torch.cat([x, x], -1)[..., ::2],
        x[:1].expand(4, 32, 24),
        x.mT.contiguous().mT,
    ]
    for laid_out in layouts:
        for matrix in (weight, weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, ::2]):
            leaf = laid_out.detach().requires_grad_()
            output = adapted_linear(leaf, matrix, bias, a, b, 0.5, **options)
            expected = composed(leaf, matrix, bias, a, b, 0.5)
            torch.testing.assert_close(output, expected, rtol=3e-2, atol=5e-2 if dtype is torch.bfloat16 else 1e-5)
            got, wanted = (torch.autograd.grad(y.square().sum(), [leaf, a, b]) for y in (output, expected))
            for one, other in zip(got, wanted, strict=True):
                assert (one - other).norm() < (0.03 if dtype is torch.bfloat16 else 1e-5) * other.norm()


def test_every_form_has_second_derivatives_and_gradients_that_torch_may_add_to(
    form: tuple[torch.dtype, dict[str, Any]],
) -> None:
    dtype, options = form
    tensors = case(3, 20, 6, out=6, dtype=dtype)
    views: list[bool] = []
    tensors[0].register_hook(lambda grad: views.append(grad._is_view()))
    output = adapted_linear(*tensors, 0.5, **options)
    wanted = [tensors[0], *tensors[3:]]
    first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    expected = torch.autograd.grad(composed(*tensors, 0.5).square().sum(), wanted, create_graph=True)
    expected += torch.autograd.grad(sum(g.square().sum() for g in expected), wanted)
    for one, other in zip((*first, *second), expected, strict=True):
        assert (one - other).norm() < (0.05 if dtype is torch.bfloat16 else 1e-4) * other.norm()
    adapted_linear(*tensors, 0.5, **options).sum().backward()
    assert views[-1] is False


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_regions_compute_the_same_bits(
    form: tuple[torch.dtype, dict[str, Any]], use_reentrant: bool
) -> None:
    dtype, options = form
    x, *others = case(2, 32, 16, out=16, dtype=dtype)
    options["training"] = True
    seen: list[Tensor] = []

    def region(x: Tensor) -> Tensor:
        seen.append(adapted_linear(x, *others, 1.0, **options))
        return seen[-1].tanh()

    checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@needs_onednn
def test_under_autocast_the_copies_have_its_dtype(weights: torch.dtype) -> None:
    if not PACKS_BFLOAT16:
        pytest.skip("linear layers in bfloat16 are not packed on this processor")
    packed = PackedWeight()
    tensors = [t.to(weights) if i in (1, 2) else t for i, t in enumerate(case(4, 16, 24, out=20))]
    results = []
    for each in ({"packed": packed}, {}):
        with torch.autocast("cpu", torch.bfloat16):
            output = adapted_linear(*tensors, 0.5, **each)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), [tensors[0], *tensors[3:]])])
    assert packed.is_filled
    for one, other in zip(*results, strict=True):
        assert one.dtype is other.dtype
        assert (one - other).norm() <= 0.02 * other.norm()
    with torch.autocast("cpu", torch.bfloat16):
        output = adapted_linear(*tensors, 0.5, packed=packed)
    kept: Any = output.grad_fn
    assert kept.saved_tensors[1].data_ptr() == tensors[1].data_ptr()  # not a copy in bfloat16, beside the packed ones
    assert torch.autograd.grad(output.float().square().sum(), tensors[3], create_graph=True)[0].requires_grad


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("tokens", [20, 1100])
def test_every_form_takes_batches_of_gradients(form: tuple[torch.dtype, dict[str, Any]], tokens: int) -> None:
    dtype, options = form
    x, *others = case(tokens, 6, out=5, dtype=dtype)
    found, expected = (adapted_linear(x, *others, 0.5, **each) for each in (options, {}))
    batch = torch.randn(3, *found.shape, dtype=dtype)
    inputs = [x, *others[2:]]
    for one, other in zip(
        *(torch.autograd.grad(y, inputs, batch, is_grads_batched=True, retain_graph=True) for y in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-4)
    by_vmap = torch.func.vmap(lambda v: torch.autograd.grad(found, x, v, retain_graph=True)[0])(batch)
    one_by_one = torch.stack([torch.autograd.grad(found, x, v, retain_graph=True)[0] for v in batch])
    torch.testing.assert_close(by_vmap, one_by_one, rtol=2e-2, atol=2e-2)
    if tokens == 20:
        jacobians = [
            torch.autograd.functional.jacobian(lambda x: adapted_linear(x, *others, 0.5, **each), x, vectorize=True)  # noqa: B023
            for each in (options, {})
        ]
        torch.testing.assert_close(*jacobians, rtol=2e-2, atol=2e-2)


# The choice


@needs_onednn
def test_the_form_follows_from_processor_dtype_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(products, "has_amx", lambda: False)
    monkeypatch.setattr(PackedWeight, "copies", lambda *_: (torch.empty(0), torch.empty(0)))

    def chosen(amd: bool, dtype: torch.dtype, rows: int, pack: bool) -> str:
        monkeypatch.setattr(products, "is_amd", lambda: amd)
        found = products_for(
            torch.ones(rows, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype), PackedWeight() if pack else None
        )
        return "torch" if found is BY_TORCH else "oneDNN" if found is BY_ONEDNN else "packed"

    for dtype in (torch.float64, torch.float16):
        assert {chosen(amd, dtype, 64, pack) for amd in (False, True) for pack in (False, True)} == {"torch"}
    assert chosen(True, torch.float32, FEW_ROWS, pack=False) == "oneDNN"
    assert chosen(True, torch.float32, FEW_ROWS, pack=True) == "packed"
    assert chosen(False, torch.float32, FEW_ROWS, pack=True) == "torch"
    for amd in (False, True):
        assert chosen(amd, torch.float32, FEW_ROWS - 1, pack=True) == "torch"
        assert chosen(amd, torch.bfloat16, FEW_ROWS, pack=False) == "torch"
        assert chosen(amd, torch.bfloat16, FEW_ROWS, pack=True) == "packed"
    monkeypatch.setattr(products, "has_amx", lambda: True)
    assert chosen(False, torch.bfloat16, FEW_ROWS, pack=True) == "torch"  # where it would write beyond its tensors


@needs_onednn
def test_onednn_reads_no_transposed_matrix_and_copies_it_only_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bool] = []
    monkeypatch.setattr(
        products,
        "_linear",
        lambda x, matrix, bias=None: read.append(matrix.is_contiguous()) or F.linear(x, matrix, bias),
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    many = ROWS_TO_COPY * 3
    by_rows, by_columns = torch.randn(3, 4), torch.randn(4, 3).T
    for rows in (many - 1, many):
        for matrix in (by_rows, by_columns):
            x, grad = torch.randn(rows, 4), torch.randn(rows, 3)
            torch.testing.assert_close(BY_ONEDNN.output(x, matrix, None), x @ matrix.T)
            torch.testing.assert_close(BY_ONEDNN.gradient(grad, matrix), grad @ matrix)
    few = [True, True]  # the output by rows, and the gradient by columns
    assert read == few + [True] * 4


def test_only_frozen_weights_on_a_cpu_with_onednn_are_packed(on_amd: None) -> None:
    x, weight, *_ = case(32, 4)
    with torch.inference_mode():
        made_in_inference = torch.ones(5, 4)
    for each in (weight.clone().requires_grad_(), made_in_inference, torch.ones(5, 8)[:, ::2]):
        assert products_for(x, each, PackedWeight()) is BY_TORCH
    assert products_for(x.to("meta"), weight.to("meta"), PackedWeight()) is BY_TORCH
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags would warn of Intel's GPUs
    try:
        assert products_for(x, weight, PackedWeight()) is BY_TORCH
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_the_processor_is_told_by_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(about: str, cpuinfo: str | None) -> bool:
        monkeypatch.setattr(platform, "processor", lambda: about)
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if cpuinfo is not None:
            file.write_text(cpuinfo)
        monkeypatch.setattr(products, "Path", lambda _: file)
        return is_amd.__wrapped__()

    linux = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: 25\n"
    assert told("", linux.format("AuthenticAMD")) and not told("x86_64", linux.format("GenuineIntel"))
    assert told("AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", None)
    assert not told("Intel64 Family 6 Model 158, GenuineIntel", None) and not told("arm", None)


@pytest.mark.parametrize("most", ["", "ALL", "DEFAULT", "AVX512_CORE_AMX", "avx10_1_512_amx_fp16", "AVX512_BF16"])
def test_amx_is_the_processors_unless_a_variable_forbids_it(most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert has_amx.__wrapped__()
    for without in ("AVX512_CORE_BF16", "avx2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", without)
        assert not has_amx.__wrapped__()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not has_amx.__wrapped__()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert has_amx.__wrapped__()


# Evaluation


def test_evaluation_keeps_torchs_products_to_the_bit(form: tuple[torch.dtype, dict[str, Any]]) -> None:
    dtype, options = form
    x, weight, bias, a, b = case(400, 24, out=20, dtype=dtype)
    for each in ({}, {"packed": options.get("packed")}):
        with torch.no_grad():
            assert torch.equal(adapted_linear(x, weight, bias, a, b * 0, 1.0, **each), F.linear(x, weight, bias))
    assert torch.equal(adapted_linear(x, weight, bias, a, b * 0, 1.0), F.linear(x, weight, bias))


def test_in_training_a_fresh_adapter_changes_float32_by_rounding_alone(on_amd: None) -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = case(256, 768, out=768)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for options in ({"training": True}, {"packed": PackedWeight()}):
        found = adapted_linear(x, weight, bias, a, b * 0, 1.0, **options)
        assert (found - exact).norm() < 1e-6 * exact.norm()


# Copies


def counted(packed: PackedWeight, weight: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What is packed now, or nothing if the copies are kept."""
    made: list[Tensor] = []
    packed.copies(weight, dtype, lambda matrix: made.append(matrix) or (matrix, matrix))  # type: ignore[func-returns-value]
    return made


CHANGES: dict[str, Callable[[torch.nn.Parameter], object]] = {
    "in place": lambda w: w.mul_(2),
    "one value": lambda w: w[3, 5].add_(1),
    "by data": lambda w: w.data.mul_(2),
    "new data": lambda w: setattr(w, "data", w.data * 2),
    "new data, one value": lambda w: setattr(
        w, "data", w.data.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(9.0))
    ),
    "by numpy": lambda w: w.detach().numpy().__imul__(2),
    "loaded": lambda w: w.copy_(w * 2),
    "laid out anew": lambda w: setattr(w, "data", w.data.T.contiguous().T),
    "transposed": lambda w: setattr(w, "data", w.data.T),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copies_are_made_anew_when_the_weight_changes_or_moves(change: Callable[[torch.nn.Parameter], object]) -> None:
    weight, packed = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False), PackedWeight()
    assert len(counted(packed, weight)) == 1 and not counted(packed, weight)
    with torch.no_grad():
        change(weight)
    assert len(counted(packed, weight)) == 1 and not counted(packed, weight)
    assert len(counted(packed, weight, torch.bfloat16)) == 1
    packed.clear()
    assert not packed.is_filled and len(counted(packed, weight)) == 1


@needs_onednn
def test_a_changed_weight_trains_with_its_new_values(on_amd: None) -> None:
    x, weight, bias, a, b = case(32, 24, out=20)
    packed = PackedWeight()
    adapted_linear(x, weight, bias, a, b, 1.0, packed=packed).sum().backward()
    weight.data.mul_(2)
    output = adapted_linear(x, weight, bias, a, b, 1.0, packed=packed)
    torch.testing.assert_close(output, composed(x, weight, bias, a, b, 1.0), rtol=1e-4, atol=1e-4)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_address_of_a_packed_weight_is_not_free_for_another_tensor() -> None:
    weight, packed = torch.randn(64, 64), PackedWeight()
    memory = StorageWeakRef(weight.untyped_storage())
    packed.copies(weight, torch.float32, lambda matrix: (matrix.clone(), matrix.T.clone()))
    del weight
    assert not memory.expired()
    packed.clear()
    assert memory.expired()


def test_threads_get_the_copies_of_their_own_weight() -> None:
    packed, wrong = PackedWeight(), []

    def use(value: float) -> None:
        weight = torch.full((4, 4), value)
        for _ in range(500):
            copies = packed.copies(weight, torch.float32, lambda matrix: (matrix.clone(), matrix.clone()))
            if len(copies) != 2 or not torch.equal(copies[0], weight):
                wrong.append(value)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(float(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@needs_onednn
def test_the_size_counts_what_onednn_fills_up() -> None:
    packed, kernel, whole = PackedWeight(), torch.ones(64, 3, 7, 7), torch.ones(64, 64)
    layout = torch.ops.mkldnn._reorder_convolution_transpose_weight
    packed.copies(kernel, torch.float32, lambda k: (k, layout(k, (3, 3), (0, 0), (1, 1), (1, 1), 1)))
    assert packed.nbytes > 2 * kernel.nbytes
    packed.copies(whole, torch.float32, products._pack)
    assert packed.nbytes == 2 * whole.nbytes


def test_no_copy_and_no_file_has_packed_weights() -> None:
    packed = PackedWeight()
    counted(packed, torch.ones(3, 3))
    assert copy.deepcopy({"packed": packed}) == {"packed": None}
    assert pickle.loads(pickle.dumps([packed])) == [None]


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_that_do_not_fit_are_left_to_torch(dtype: torch.dtype, on_amd: None) -> None:
    x, weight, bias, a, b = case(32, 24, out=20, dtype=dtype)
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    packed = PackedWeight()
    with pytest.raises(RuntimeError, match="dtype"):
        adapted_linear(x, weight.to(other), bias, a, b, 1.0, packed=packed)
    try:
        expected: Any = F.linear(x, weight, bias.to(other))
    except RuntimeError:  # not every torch mixes them
        expected = None
    if expected is None:
        with pytest.raises(RuntimeError, match="dtype"):
            adapted_linear(x, weight, bias.to(other), a, b, 1.0, packed=packed)
    else:
        assert torch.equal(adapted_linear(x, weight, bias.to(other), a, b * 0, 1.0, packed=packed), expected)
    assert not packed.is_filled
