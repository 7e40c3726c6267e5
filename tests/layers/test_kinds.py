"""Every kind of layer computes W + ΔW."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.layers import LoRALayer
from tests.support.compared import assert_state
from tests.support.layers import LAYERS, Linear, Model, config, factors, reference
from tests.support.models import randomise, state


@pytest.fixture(params=LAYERS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Any]:
    build, x = LAYERS[request.param]
    torch.manual_seed(0)
    return Model(build()).double(), x


def some(*kinds: str) -> Any:
    """These kinds of layers, where a rule does not depend on what the layer computes."""
    return pytest.mark.parametrize("case", kinds, indirect=True)


@pytest.mark.parametrize("pair", [(nn.Linear(2, 2), LoRALayer), (nn.Linear, nn.Linear)])
def test_what_are_no_classes_of_layers_and_adapters_is_not_registered(pair: Any) -> None:
    with pytest.raises(ll.ConfigError, match=r"register_adapter got .*Expected a class of layers, and"):
        ll.register_adapter(*pair)


def test_the_first_argument_of_ones_own_layer_may_have_any_name() -> None:
    class LoRAOwn(LoRALayer):
        def lora_update(self, lora_A: Tensor, lora_B: Tensor, *, x: Tensor) -> Tensor:
            return x @ lora_A.T @ lora_B.T * self.lora_settings.scaling

    own = type("Own", (Linear,), {})
    ll.register_adapter(own, LoRAOwn)
    model = nn.Sequential(own(5, 4))
    ll.inject_adapters(model, config(model, dropout=0.5))
    assert model[0](x=torch.ones(2, 5)).shape == (2, 4)


def test_adapters_change_nothing_while_fresh_or_disabled_and_leave_no_trace(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    before = model(x)
    layer = model[0]
    cls = type(model[0])
    weights = list(model.parameters())
    model.requires_grad_(False)
    frozen = model(x)  # torch may round differently then
    values = state(model)
    keys = list(model.state_dict())
    calls = list[str]()
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    ll.inject_adapters(model, config(model))
    assert torch.equal(model(x), before)
    assert set(calls) == {"forward"}
    assert model[0] is layer
    assert isinstance(layer, cls)
    assert isinstance(layer, LoRALayer)
    assert [p for name, p in model.named_parameters() if "lora_" not in name] == weights
    assert [key for key in model.state_dict() if "lora_" not in key] == keys
    randomise(model)
    for change in (lambda _: None, ll.merge_adapters):
        change(model)
        with ll.disable_adapters(model):
            assert torch.equal(model(x), frozen)
    ll.unmerge_adapters(model)
    ll.remove_adapters(model)
    assert type(model[0]) is cls
    assert_state(model, values)
    assert torch.equal(model(x), frozen)
    assert not any(p.requires_grad for p in weights)
    assert not [name for name in (*vars(model[0]), *vars(model)) if "lora" in name]


def test_adapted_layer_computes_the_papers_equation_and_its_gradients(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    ll.inject_adapters(model, config(model))
    randomise(model)
    layer: Any = model[0]
    if getattr(layer, "padding_idx", None) is not None:
        layer.lora_A.data[:, layer.padding_idx] = 0  # where it starts, and stays: the token's column has no gradient
    lora = factors(layer)
    expected = reference(model, lora, x)
    for training in (False, True):
        model.train(training)
        output = model(x)
        torch.testing.assert_close(output, expected)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(model(x), expected)
    for each in (output, expected):
        each.square().sum().backward()
    for name, p in layer.lora_parameters().items():
        torch.testing.assert_close(p.grad, lora[name].grad)
    assert all(p.grad is None for name, p in layer.named_parameters() if "lora_" not in name)


def test_merged_computes_as_adapted_and_unmerging_is_exact(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    plain = copy.deepcopy(model)
    ll.inject_adapters(model, config(model))
    randomise(model)
    before = state(model)
    adapted = model(x)
    weights = list(model.parameters())
    base = {id(p) for name, p in model.named_parameters() if "lora_" not in name}
    ll.merge_adapters(model)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), adapted)
    assert {id(p) for p in model.parameters()} == base
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), adapted)
    kept = copy.deepcopy(model)
    ll.remove_adapters(kept)
    assert torch.equal(kept(x), plain(x))
    ll.unmerge_adapters(model)
    assert_state(model, before)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert torch.equal(model(x), adapted)


@some("linear", "scaled", "padding convolution", "lstm", "attention", "experts")
@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_are_adapted_models_of_their_own(case: tuple[nn.Sequential, Any], merged: bool) -> None:
    model, x = case
    ll.inject_adapters(model, config(model))
    randomise(model)
    if merged:
        ll.merge_adapters(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    expected = model(x)
    kind = type(model[0])
    randomise(model, seed=9)
    ll.remove_adapters(model)
    for each in copies:
        assert type(each[0]) is kind
        assert torch.equal(each(x), expected)
        ll.unmerge_adapters(each)
        ll.remove_adapters(each)
        assert type(each[0]) is type(model[0])


@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="its compiler refuses some of them")
@some("linear", "embedding", "scaled", "bag", "grouped convolution", "attention", "experts")
def test_compiled_layer_computes_the_same_adapted_merged_and_unmerged(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    torch._dynamo.reset()
    ll.inject_adapters(model, config(model))
    randomise(model)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for change in (lambda _: None, ll.merge_adapters, ll.unmerge_adapters):
        change(model)
        torch.testing.assert_close(compiled(x), expected)


@some(
    "linear",
    "scaled",
    "embedding",
    "bag",
    "convolution",
    "circular convolution",
    "bilinear",
    "lstm",
    "experts",
)
def test_dropout_acts_in_training_alone_and_takes_nothing_away_on_average(case: tuple[nn.Sequential, Any]) -> None:
    model, x = case
    plain = copy.deepcopy(model)
    ll.inject_adapters(model, config(model, dropout=0.5))
    ll.inject_adapters(plain, config(plain))
    for each in (model, plain):
        randomise(each, scale=0.01)
    expected = plain.eval()(x)
    torch.testing.assert_close(model.eval()(x), expected)
    layer: Any = model[0]
    layer.lora_step.runs = True  # as the Trainer's strategy sets it, whatever the mode
    assert torch.equal(model(x), model(x)) is not layer.lora_drops_input
    assert not layer.training
    model.eval()
    if not layer.lora_drops_input:
        assert torch.equal(model.train()(x), model.eval()(x))
        return
    with torch.no_grad():
        torch.manual_seed(1)
        outputs = torch.stack([model.train()(x) for _ in range(200)])
        torch.manual_seed(1)
        assert torch.equal(model(x), outputs[0])
        assert not torch.equal(outputs[0], outputs[1])
    deviation = outputs.std(dim=0) / 200**0.5
    assert ((outputs.mean(dim=0) - expected).abs() <= 6 * deviation + 1e-4 * expected.abs().max()).all()
