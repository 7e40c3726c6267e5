"""The mathematics on tensors: the gradients that are written out are those that torch derives."""

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import AdapterStateError, LoRAConfig, inject_adapters, merge_adapters
from lightning_lora.functional import linear, update
from lightning_lora.functional.dropout import drops
from lightning_lora.functional.linear import adapted_linear

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)


def inputs(*shape: int, out: int = 5, r: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = (shape, (out, shape[-1]), (out,), (r, shape[-1]), (out, r))
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def goes_by_hand(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_AdaptedLinearBackward"


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors like ``x`` in ways that memory may hold them."""
    return {
        "contiguous": x,
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.cat([x, x], -1)[..., : x.shape[-1]],
        "expanded": x[:1].expand(x.shape) if x.dim() > 1 else x,
        "every second": torch.stack([x, x], 0).movedim(0, -1).flatten(-2)[..., ::2],
    }


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).flatmap(lambda s: st.tuples(*map(st.just, s), st.integers(1, 6))),
    out=st.integers(1, 6),
    r=st.integers(1, 4),
    scaling=st.floats(-3, 3, width=16),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "every second"]),
    trained=st.sets(st.sampled_from(NAMES), min_size=1),
    with_bias=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_gradients_are_those_of_the_composition(
    shape: tuple[int, ...], out: int, r: int, scaling: float, layout: str, trained: set[str], with_bias: bool
) -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs(*shape, out=out, r=r))
    x = layouts(x)[layout]
    tensors = dict(zip(NAMES, (x, weight, bias, a, b), strict=True))
    if not with_bias:
        del tensors["bias"]
    for name in trained & tensors.keys():
        tensors[name].requires_grad_()
    call = {"bias": None, **tensors}
    ours, theirs = adapted_linear(**call, scaling=scaling), composed(*(call[name] for name in NAMES), scaling)
    torch.testing.assert_close(ours, theirs)
    wanted = [t for t in tensors.values() if t.requires_grad]
    if not wanted:
        return
    assert goes_by_hand(ours)
    for grad in layouts(torch.randn_like(ours)).values():
        got = torch.autograd.grad(ours, wanted, grad, retain_graph=True)
        for one, other in zip(got, torch.autograd.grad(theirs, wanted, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_pass_torchs_check_to_the_second_order(dropout: float) -> None:
    torch.manual_seed(0)
    tensors = inputs(2, 3, 4, out=3)

    def compute(*args: Any) -> Tensor:
        torch.manual_seed(1)
        return adapted_linear(*args, 0.7, dropout)

    assert torch.autograd.gradcheck(compute, tensors)
    assert torch.autograd.gradgradcheck(compute, tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_that_have_gradients_are_the_same_gradients(dropout: float) -> None:
    torch.manual_seed(0)
    tensors = inputs(2, 3, 40, out=30)
    output = adapted_linear(*tensors, 0.7, dropout)
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(output, tensors, grad, create_graph=True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [4, 400])
def test_gradients_that_have_gradients_are_right_where_a_layer_is_used_twice(tokens: int) -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = inputs(tokens, 6, out=6)

    def twice(f: Callable[..., Tensor]) -> Tensor:
        return f(f(x, weight, bias, a, b, 0.5).tanh(), weight, bias, a, b, 0.5).square().sum()

    found, expected = (torch.autograd.grad(twice(f), [x, a, b], create_graph=True) for f in (adapted_linear, composed))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# The rule that chooses between W x + B A x and (W + B A) x


@pytest.mark.parametrize("tokens", [4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_weights_are_updated_for_many_tokens_where_no_small_update_is_lost(
    tokens: int, dtype: torch.dtype, precision: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(linear, "_updated", lambda w, a, b, s: made.append(w) or w + s * b @ a)  # type: ignore[func-returns-value]
    x, weight, bias, a, b = inputs(tokens, 2, out=3, r=1, dtype=dtype)  # 4.8 tokens are twice the mean of 2 and 3
    torch.set_float32_matmul_precision(precision)
    try:
        adapted_linear(x, weight, bias, a, b, 1.0, dropout)
    finally:
        torch.set_float32_matmul_precision("highest")
    loses = dtype is torch.bfloat16 or (dtype is torch.float32 and precision != "highest")
    assert bool(made) is (tokens == 5 and not dropout and not loses)


def test_a_fresh_update_changes_nothing_whatever_the_form_and_the_layout() -> None:
    torch.manual_seed(0)
    for tokens, reads, writes in itertools.product((3, 400), range(4, 40, 5), range(4, 40, 7)):
        x, weight, bias, a, b = inputs(tokens, reads, out=writes)
        bias, every_second = bias.detach(), torch.randn(writes, 2 * reads, dtype=weight.dtype)[:, ::2]
        for laid_out in (weight.detach(), weight.detach().T.contiguous().T, every_second):
            assert torch.equal(adapted_linear(x, laid_out, bias, a, b * 0, 1.0), F.linear(x, laid_out, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapters", [torch.float32, None])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_as_exact_as_the_dtype_allows(dtype: torch.dtype, adapters: Any, dropout: float) -> None:
    torch.manual_seed(0)
    wide = inputs(3, 17, 32, out=24, r=4)
    narrow = [t.detach().to(adapters or dtype if i > 2 else dtype).requires_grad_() for i, t in enumerate(wide)]
    grad = torch.randn(3, 17, 24, dtype=torch.float64)
    outputs = []
    for tensors in (wide, narrow):
        torch.manual_seed(5)
        output = adapted_linear(*tensors, 2.0, dropout)
        output.backward(grad.to(output.dtype))
        outputs.append(output)
    assert outputs[1].dtype is dtype
    eps = torch.finfo(dtype).eps
    for exact, rounded in [(outputs[0], outputs[1]), *((w.grad, n.grad) for w, n in zip(wide, narrow, strict=True))]:
        assert (exact - rounded).norm() < 4 * eps * exact.norm()
    assert [n.grad.dtype for n in narrow] == [n.dtype for n in narrow]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaling_is_exact_and_keeps_half_precision_within_its_range(dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    x, weight, _, a, b = (t.detach() for t in inputs(256, 64))
    rounded = [t.to(dtype).requires_grad_() for t in (x, weight * 0, a * 20, b * 200)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    grad, scaling = 32 * torch.randn(256, 5), 1.004e-3  # float16 cannot hold g A, and can s g A; bfloat16 not s
    for x, weight, a, b in (exact, rounded):
        torch.manual_seed(5)
        adapted_linear(x, weight, None, a, b, scaling, dropout).backward(grad.to(x.dtype))
    for wide, narrow in zip(exact, rounded, strict=True):
        size = (narrow.grad.double() * wide.grad).sum() / wide.grad.square().sum()
        assert abs(size - 1) < torch.finfo(dtype).eps / narrow.numel() ** 0.2  # of many values, errors even out


def test_merging_asks_no_device_for_float64() -> None:
    class Apple(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                assert not (isinstance(tensor, Tensor) and tensor.is_meta and tensor.dtype is torch.float64), func
            return made

    weight, a, b = (torch.empty(size, device="meta") for size in ((600, 1024), (2, 1024), (600, 2)))
    with Apple():
        for dtype in (torch.float32, torch.float16):
            values, lost = update.merged(weight.to(dtype), a, b, 1.0)
            assert values.dtype is dtype and lost == 0


# Dropout


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_each_element_is_dropped_by_itself_at_the_asked_rate(p: float) -> None:
    ones = torch.ones(2_000, 500)
    for block, drop in drops(ones, p, seed=3):
        drop(ones[block])
    dropped = ones == 0
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(dropped.double().mean() - p) < 4 * deviation
    for place in (0, 1, 499):  # whatever the column, the first and the last of a block too
        assert abs(dropped[:, place].double().mean() - p) < 5 * (p * (1 - p) / 2_000) ** 0.5
    flat = dropped.flatten().double() - p
    for lag in (1, 2, 3, 499, 500, 1000):  # and whatever its neighbours do
        covariance = (flat[:-lag] * flat[lag:]).mean()
        assert abs(covariance) < 5 * p * (1 - p) / flat.numel() ** 0.5


def test_what_is_dropped_follows_from_the_seed_and_differs_from_call_to_call() -> None:
    x, weight, _, a, b = inputs(64, 32, out=8)

    def update() -> Tensor:
        return adapted_linear(x, weight * 0, None, a, b, 1.0, 0.5)

    torch.manual_seed(0)
    first, second = update(), update()
    torch.manual_seed(0)
    assert torch.equal(update(), first) and torch.equal(update(), second) and not torch.equal(first, second)
    torch.manual_seed(1)
    assert not torch.equal(update(), first)


def test_dropout_is_as_torchs_in_the_mean() -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = inputs(20, 30, out=8)
    mean = torch.stack([adapted_linear(x, weight, bias, a, b, 1.0, 0.3).detach() for _ in range(4000)]).mean(0)
    deviation = (mean - composed(x, weight, bias, a, b, 1.0)).norm() / composed(x, weight, bias, a, b, 1.0).norm()
    assert deviation < 0.02


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_regions_drop_the_same(use_reentrant: bool) -> None:
    x, *others = inputs(8, 16, 32, out=32, dtype=torch.float32)
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        output = run(lambda x: adapted_linear(x, *others, 1.0, 0.5).tanh(), x)
        gradients.append(
            torch.autograd.grad(output.sum(), [x, *others]) if not use_reentrant else backward(output, x, others)
        )
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def backward(output: Tensor, *inputs: Any) -> list[Tensor]:
    leaves = [inputs[0], *inputs[1]]
    for leaf in leaves:
        leaf.grad = None
    output.sum().backward()
    return [leaf.grad.clone() for leaf in leaves]


# Memory


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_is_kept_for_the_backward_pass_beside_the_input(dropout: float, dtype: torch.dtype) -> None:
    x, weight, bias, a, b = inputs(256, 768, out=768, r=8, dtype=dtype)
    a, b = (t.detach().float().requires_grad_() for t in (a, b))  # as adapters of a half-precision base are
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = adapted_linear(x, weight, bias, a, b, 1.0, dropout)
    assert goes_by_hand(output)
    for t in (x, weight, bias, a, b):
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 0.02 * x.nbytes


# Where the composition is taken instead


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # which torch's own rules for second derivatives use
def test_functional_transforms_and_forward_mode_derive_the_same() -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = (t.detach() for t in inputs(3, 4, 6, out=5))

    def compute(f: Callable[..., Tensor]) -> dict[str, Tensor]:
        def layer(x: Tensor, a: Tensor) -> Tensor:
            return f(x, weight, bias, a, b, 0.5)

        made = {
            "grad": torch.func.grad(lambda a: layer(x, a).square().sum())(a),
            "vmap": torch.func.vmap(layer, in_dims=(0, None))(x, a),
            "per sample": torch.func.vmap(torch.func.grad(lambda a, x: layer(x, a).square().sum()), in_dims=(None, 0))(
                a, x
            ),
            "jvp": torch.func.jvp(lambda a: layer(x, a), (a,), (torch.ones_like(a),))[1],
            "hessian": torch.func.hessian(lambda a: layer(x, a).square().sum())(a),
        }
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(a, torch.ones_like(a))
            made["forward"] = torch.autograd.forward_ad.unpack_dual(layer(x, dual)).tangent
        return made

    ours, theirs = compute(adapted_linear), compute(composed)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (64, 4), (2, 3, 4)])
def test_backward_takes_batches_of_gradients_and_dual_ones(shape: tuple[int, ...]) -> None:
    tensors = inputs(*shape)
    outputs = adapted_linear(*tensors, 0.5), composed(*tensors, 0.5)
    assert goes_by_hand(outputs[0])
    batch = torch.randn(7, *outputs[0].shape, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(y, tensors, batch, retain_graph=True, is_grads_batched=True) for y in outputs)
    torch.testing.assert_close(found, wanted)
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.grad(y, tensors, torch.autograd.forward_ad.make_dual(batch[0], batch[1])) for y in outputs
        ]
        for found, wanted in zip(*duals, strict=True):
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(
                torch.autograd.forward_ad.unpack_dual(found).tangent,
                torch.autograd.forward_ad.unpack_dual(wanted).tangent,
            )


def test_autocast_computes_in_its_dtype_by_hand() -> None:
    tensors = inputs(4, 8, 16, out=16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted_linear(*tensors, 1.0)
        exact = composed(*(t.detach().double() for t in tensors), 1.0)  # which autocast leaves alone
    assert output.dtype is torch.bfloat16 and goes_by_hand(output)
    assert (output - exact).norm() < 0.02 * exact.norm()
    output.sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted_linear(*(t.double() for t in tensors), 1.0).dtype is torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_whole_it_is_one_graph(dropout: float) -> None:
    tensors = inputs(4, 8, 16, out=16, dtype=torch.float32)
    compiled = torch.compile(linear.adapted_linear, fullgraph=True, backend="aot_eager")
    output = compiled(*tensors, 0.5, dropout)
    if not dropout:
        torch.testing.assert_close(output, composed(*tensors, 0.5))
    output.sum().backward()
    assert all(t.grad is not None for t in tensors)


def test_tensors_without_values_or_of_other_classes_are_composed() -> None:
    class Other(Tensor):
        pass

    x, weight, bias, a, b = inputs(3, 6, dtype=torch.float32)
    assert not goes_by_hand(adapted_linear(x.as_subclass(Other), weight, bias, a, b, 1.0))
    meta = [t.to("meta") for t in (x, weight, bias, a, b)]
    assert adapted_linear(*meta, 1.0, 0.1).shape == (3, 5)
    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
    with torch.no_grad():
        output = adapted_linear(nested, weight, bias, a, b, 1.0)
    torch.testing.assert_close(output.unbind()[1], composed(torch.ones(3, 6), weight, bias, a, b, 1.0))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(not hasattr(dist.tensor, "distribute_tensor"), reason="torch has no public DTensor")
def test_distributed_tensors_are_composed() -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    tensors = [t.detach() for t in inputs(3, 6, dtype=torch.float32)]
    shared = [dist.tensor.distribute_tensor(t, mesh, [dist.tensor.Shard(0)]).requires_grad_() for t in tensors]
    output = adapted_linear(*shared, 1.0)
    assert isinstance(output, dist.tensor.DTensor)
    torch.testing.assert_close(output.full_tensor(), composed(*tensors, 1.0))
    output.sum().backward()
    assert all(isinstance(t.grad, dist.tensor.DTensor) for t in shared)


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(not hasattr(dist.tensor, "distribute_tensor"), reason="torch has no public DTensor")
def test_merging_into_distributed_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, LoRAConfig(r=2))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for name, p in list(model[0].named_parameters()):
        spread = dist.tensor.distribute_tensor(p.detach(), mesh, [dist.tensor.Shard(0)])
        setattr(model[0], name, nn.Parameter(spread, p.requires_grad))
    with pytest.raises(AdapterStateError, match="are distributed"):
        merge_adapters(model)


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(not hasattr(dist.fsdp, "fully_shard"), reason="torch has no public fully_shard")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_parameters_that_are_sharded_between_passes_get_the_same_gradients(dropout: float) -> None:
    gradients = []
    for shard in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        inject_adapters(model, LoRAConfig(r=2, dropout=dropout))
        for layer in model[::2]:
            nn.init.normal_(layer.lora_B)
        if shard:
            dist.fsdp.fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        torch.manual_seed(1)
        model(torch.randn(5, 8)).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({name: grad.full_tensor() if shard else grad for name, grad in found.items()})
    assert len(gradients[0]) == 4
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad)


def test_defaults_of_device_and_dtype_do_not_reach_dropout() -> None:
    tensors = inputs(4, 8, dtype=torch.float32)
    torch.manual_seed(0)
    expected = adapted_linear(*tensors, 1.0, 0.5)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        with torch.device("meta"):
            found = adapted_linear(*tensors, 1.0, 0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_without_gradients_nothing_is_recorded_and_arguments_stay_as_they_are() -> None:
    tensors = inputs(3, 6, dtype=torch.float32)
    before = copy.deepcopy([t.detach() for t in tensors])
    expected = adapted_linear(*tensors, 1.0).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = adapted_linear(*tensors, 1.0)
        assert output.grad_fn is None and torch.equal(output, expected)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("tokens", [4, 400])
def test_operations_are_counted_in_full(tokens: int) -> None:
    x, weight, bias, a, b = inputs(tokens, 8, out=8)
    flops = []
    for f in (adapted_linear, composed):
        with FlopCounterMode(display=False) as counter:
            f(x, weight, bias, a, b, 1.0).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


@pytest.mark.skipif(not hasattr(torch.utils.checkpoint, "create_selective_checkpoint_contexts"), reason="older torch")
@pytest.mark.parametrize("tokens", [4, 400])
def test_selective_checkpointing_keeps_what_it_is_told_to(tokens: int) -> None:
    x, weight, bias, a, b = inputs(tokens, 8, out=8)
    create_contexts = torch.utils.checkpoint.create_selective_checkpoint_contexts
    save = partial(create_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    outputs = [
        checkpoint(lambda x, f=f: f(x, weight, bias, a, b, 1.0), x, use_reentrant=False, context_fn=save)
        for f in (adapted_linear, composed)
    ]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), [x, a, b]) for y in outputs), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_of_another_device_changes_nothing() -> None:
    tensors = inputs(4, 3, dtype=torch.float32)
    torch.set_autocast_enabled("cuda", True)
    try:
        output = adapted_linear(*tensors, 1.0)
        output.sum().backward()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert goes_by_hand(output) and output.dtype is tensors[0].grad.dtype is torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_backward_may_run_under_an_autocast_that_forward_did_not(dropout: float) -> None:
    tensors, grad = inputs(4, 6, dtype=torch.float32), torch.randn(4, 5)
    output = adapted_linear(*tensors, 1.0, dropout)
    expected = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, tensors, grad)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_the_gradient_of_the_input_is_no_view_so_that_torch_may_add_to_it_in_place(tokens: int) -> None:
    x, *others = inputs(2, tokens, 4)
    x.register_hook(lambda grad: views.append(grad._is_view()))
    views: list[bool] = []
    adapted_linear(x, *others, 0.5).sum().backward()
    assert views == [False]


def test_a_few_tokens_are_not_rounded_to_narrower_adapters() -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs(2, 64, out=32, r=4))
    for factors in ((a.bfloat16(), b.bfloat16()), (a, b.bfloat16()), (a.bfloat16(), b)):
        with torch.no_grad():
            found = adapted_linear(x, weight, bias, *factors, 1.0)
        torch.testing.assert_close(found, composed(x, weight, bias, *(t.double() for t in factors), 1.0))


def test_a_base_that_was_loaded_in_inference_mode_trains_in_a_first_layer() -> None:
    x, _, _, a, b = inputs(4, 6)
    with torch.inference_mode():
        weight = torch.randn(5, 6, dtype=torch.float64)
    output = adapted_linear(x.detach(), weight, None, a, b, 1.0)
    once = torch.autograd.grad(output.square().sum(), [a, b], create_graph=True)
    plain = composed(x.detach(), weight.clone(), None, a, b, 1.0).square().sum()
    for one, other in zip(once, torch.autograd.grad(plain, [a, b]), strict=True):
        torch.testing.assert_close(one, other)


def test_merging_weights_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, LoRAConfig(r=2))
    with pytest.raises(AdapterStateError, match="no values yet"):
        merge_adapters(model)


def test_a_changed_input_is_noticed_before_a_wrong_gradient() -> None:
    x, weight, bias, a, b = inputs(3, 6)
    output = adapted_linear(x, weight, bias, a, b, 1.0)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
