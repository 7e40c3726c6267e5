"""Half precision, double precision and torch.compile: right numbers, right bits, and a warning where they cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterMismatchError,
    LoRAConfig,
    LoRAWarning,
    MergePrecisionWarning,
    adapter_state_dict,
    disable_adapters,
    inject_adapters,
    load_adapter,
    load_adapter_state_dict,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from tests.models import (
    ADAPTERS,
    TRAINED,
    WIDTH,
    WORDS,
    LitTiny,
    best,
    data,
    exact,
    is_plain,
    lora,
    randomise,
    same,
    state,
    trainer,
)

X = torch.arange(WORDS)
HALVES = [torch.bfloat16, torch.float16]


class Three(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, index: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.linear(self.embed(index))))


def three(**kwargs: Any) -> Three:
    model = Three()
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", **kwargs))
    randomise(model, scale=0.3)
    return model


# What adapters are kept in


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("first", ["convert", "inject"])
def test_adapters_are_kept_in_float32_over_a_half_precision_base(dtype: torch.dtype, first: str) -> None:
    model = three() if first == "inject" else Three().to(dtype)
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()} if first == "inject" else {}
    if first == "inject":
        model.linear(torch.ones(WIDTH)).sum().backward()
        model.to(dtype)
        assert same(adapter_state_dict(model), before)
        assert model.linear.lora_A.grad.dtype == torch.float32
    else:
        inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    assert model.linear.weight.dtype == dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(X).dtype == dtype
    assert model.double().linear.lora_A.dtype == torch.float64 and model.to(dtype).linear.lora_A.dtype == torch.float32


def test_adapters_are_kept_as_the_base_if_asked() -> None:
    model = three(autocast_adapter_dtype=False).bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(
        AdapterMismatchError,
        match="autocast_adapter_dtype=False; this configuration asks for autocast_adapter_dtype=True",
    ):
        inject_adapters(model, LoRAConfig(r=2, target_modules="all"))


def test_meta_adapters_become_real_in_float32() -> None:
    with torch.device("meta"):
        model = Three()
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    model.bfloat16().to_empty(device="cpu")
    assert model.linear.lora_A.dtype == torch.float32 and model.linear.weight.dtype == torch.bfloat16


# Right numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("merged", [False, True])
def test_outputs_and_gradients_are_those_of_float64(dtype: torch.dtype, keep: bool, merged: bool) -> None:
    model = three(autocast_adapter_dtype=keep).to(dtype)
    exact = three().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    if merged:
        merge_adapters(model)
    near = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    output, expected = model(X), exact(X)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, **near)
    if not merged:
        output.square().mean().backward()
        expected.square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(
                    p.grad.double(), q.grad, **near, msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("merged", [False, True])
def test_autocast_computes_what_the_base_computes_it_in(merged: bool) -> None:
    model, exact = three(), three().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    base = Three()
    if merged:
        merge_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        output, dtype = model(X), base(X).dtype
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact(X), rtol=0.1, atol=0.1)


@exact
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_every_precision_trains_saves_resumes_and_merges(tmp_path: Path, precision: Any) -> None:
    # Adam's epsilon is zero in float16, so that a head trained whole, which is in it, would diverge
    head = {"modules_to_save": None, "exclude_modules": ["head"]} if precision == "16-true" else {}

    def run(folder: str, epochs: int, ckpt: Any = None) -> tuple[LitTiny, Any]:
        torch.manual_seed(0)
        model, checkpoint = LitTiny(), best(tmp_path / folder, monitor=None)
        t = trainer(tmp_path, [lora(dropout=0.3, **head), checkpoint], max_epochs=epochs, precision=precision)
        t.fit(model, data(), data(), ckpt_path=ckpt)
        return model, checkpoint.best_model_path

    whole, path = run("whole", 4)
    _, part = run("part", 2)
    resumed, _ = run("part", 4, part)
    assert is_plain(whole) and same(state(resumed), state(whole))
    wide = torch.float64 if precision == "64-true" else torch.float32
    stored = torch.load(path, weights_only=True)
    assert {stored["state_dict"][name].dtype for name in ADAPTERS} == {wide}
    assert sorted(stored["state_dict"]) == sorted(ADAPTERS if head else TRAINED)
    results = [
        trainer(tmp_path, [lora(dropout=0.3, **head)], precision=precision).test(
            model, data(), ckpt_path=path, verbose=False
        )
        for model in (whole, LitTiny())
    ]
    assert results[0] == results[1]


def test_mixed_float16_is_as_lightning_has_it_on_this_device(tmp_path: Path) -> None:
    model = LitTiny()
    with pytest.warns(UserWarning, match="not supported on CPU. Using `precision='bf16-mixed'`"):
        t = trainer(tmp_path, [lora(merge=False)], precision="16-mixed")
    t.fit(model, data())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(model.get_parameter(name).any() for name in ADAPTERS)


def test_float64_adapters_are_not_rounded_into_a_float32_model(tmp_path: Path) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora(merge=False)], precision="64-true")
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "double.ckpt")
    narrow = LitTiny()
    before = state(narrow)
    with pytest.raises(AdapterMismatchError, match=r"float64.*model.to\(torch.float64\)"):
        load_adapter(narrow, tmp_path / "double.ckpt")
    assert is_plain(narrow) and same(state(narrow), before)


# Numbers that lie at merge


@pytest.mark.parametrize("dtype", HALVES)
def test_merge_says_what_share_of_the_update_rounding_took(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    inject_adapters(model, LoRAConfig(r=4))
    with torch.no_grad():
        model[0].lora_B.normal_(std=0.1)
        model[1].lora_B.normal_(std=1e-6)
    delta = (model[1].lora_B @ model[1].lora_A).double()
    weight = model[1].weight.double()
    lost = ((weight + delta).to(dtype).double() - weight - delta).norm() / delta.norm()
    assert lost > 0.9
    with pytest.warns(MergePrecisionWarning, match=rf"{lost:.0%} of the update of '1'.* in 1 of 2 layers.*float32"):
        merge_adapters(model)
    unmerge_adapters(model)
    merge_adapters(model.float())


def test_small_update_of_a_float32_base_merges_in_silence() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    inject_adapters(model, LoRAConfig(r=4))
    nn.init.normal_(model[0].lora_B, std=1e-6)
    merge_adapters(model)


def test_fit_warns_once_of_a_merge_that_loses_the_update(tmp_path: Path) -> None:
    model, t = LitTiny(lr=1e-7), trainer(tmp_path, [lora()], precision="bf16-true")
    with pytest.warns(MergePrecisionWarning) as caught:
        t.fit(model, data())
    assert len([w for w in caught if issubclass(w.category, LoRAWarning)]) == 1
    t.validate(model, data(), verbose=False)  # merges again, and an unexpected warning is an error here


def test_merge_is_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    inject_adapters(model, LoRAConfig(r=4))
    nn.init.normal_(model[0].lora_B, std=0.1)
    expected = (model[0].weight.float() + model[0].lora_B @ model[0].lora_A).bfloat16()
    merge_adapters(model)
    assert torch.equal(model[0].weight, expected)


# torch.compile


class Compiled(LitTiny):
    """A module whose q_proj was compiled before it met any adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.compile(self.q_proj, backend="eager", fullgraph=True)


def counted(backend: Any = "eager") -> tuple[Any, list[int]]:
    """A backend of torch.compile that counts the graphs it is given."""
    graphs: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    return count, graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch, as it compiles any linear layer
@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_submodule_is_adapted_and_its_keys_are_plain(tmp_path: Path, compiled_first: bool) -> None:
    torch.manual_seed(0)
    plain, model = LitTiny(), Compiled()
    if compiled_first:
        model(X)  # so that there is a graph without an adapter
    for each, folder in ((plain, "plain"), (model, "compiled")):
        torch.manual_seed(0)
        t = trainer(tmp_path, [lora(target_modules=["q_proj"]), best(tmp_path / folder, monitor=None)])
        t.fit(each, data(), data())
    assert torch.equal(model(X), plain(X)) and type(model.q_proj._orig_mod) is nn.Linear
    path = t.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert sorted(torch.load(path, weights_only=True)["state_dict"]) == sorted(
        ["q_proj.lora_A", "q_proj.lora_B", "head.weight", "head.bias"]
    )
    for other in (LitTiny(), Compiled()):
        load_adapter(other, path)
        torch.testing.assert_close(other(X), plain(X))
        load_adapter_state_dict(other, adapter_state_dict(other))
    save_adapter(model, tmp_path / "a.safetensors")
    again = LitTiny()
    load_adapter(again, tmp_path / "a.safetensors")
    torch.testing.assert_close(again(X), plain(X))


def test_compiled_module_trains_as_the_plain_one_and_compiles_once(tmp_path: Path) -> None:
    results = []
    backend, graphs = counted()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = LitTiny()
        t = trainer(tmp_path, [lora(merge=False)], max_epochs=3, enable_checkpointing=False)
        t.fit(torch.compile(model, backend=backend) if compiled else model, data())
        results.append(state(model))
        if compiled:
            seen = len(graphs)
            t.fit_loop.max_epochs = 6
            t.fit(torch.compile(model, backend=backend), data())
    assert same(*results)
    assert seen > 0 and len(graphs) <= 2 * seen


@pytest.mark.parametrize("kind", ["eval", "train"])
def test_no_step_compiles_again(kind: str) -> None:
    torch._dynamo.reset()
    backend, graphs = counted()
    model = three(dropout=0.1).train(kind == "train")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        compiled(X).sum().backward()
        optimizer.step()
    assert len(graphs) == 1
    if kind == "eval":
        expected = model(X)
        torch.testing.assert_close(compiled(X), expected)
        merge_adapters(model)
        torch.testing.assert_close(compiled(X), expected)
        unmerge_adapters(model)
        torch.testing.assert_close(compiled(X), expected)


def test_model_that_is_compiled_itself_is_the_model_inside() -> None:
    model = three()
    compiled = torch.compile(Three(), backend="eager")
    assert inject_adapters(compiled, LoRAConfig(r=2, target_modules="all")) == ("embed", "linear", "conv")
    assert list(adapter_state_dict(compiled)) == list(adapter_state_dict(compiled._orig_mod))
    load_adapter_state_dict(compiled, adapter_state_dict(model))
    assert same(adapter_state_dict(compiled), adapter_state_dict(model))


def test_autocast_remembers_no_weight_of_another_model() -> None:
    """It keeps half-precision copies of the weights it has met: not of those of the base, nor of merged ones."""

    def trained() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        inject_adapters(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
        with torch.no_grad():
            model[0].lora_B.fill_(1), model[1].weight.fill_(5)
        return model

    def base(model: nn.Module) -> Tensor:
        with disable_adapters(model):
            return model(x)

    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(trained()), trained()(x)
    for first in (0, 1):
        model = trained()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [base(model), model(x)] if first == 0 else [model(x), base(model)][::-1]
        assert torch.equal(outputs[0], expected[0]) and torch.equal(outputs[1], expected[1])


def test_merge_inside_autocast_is_the_merge() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    merge_adapters(model)
    merged = state(model[0].cpu())
    weight = model[0].weight.detach().clone()
    unmerge_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        merge_adapters(model)
        assert torch.equal(model[0].weight, weight)
        with disable_adapters(model):
            pass
    assert torch.equal(model[0].weight, weight) and same(state(model[0]), merged)
