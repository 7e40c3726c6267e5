"""Every kind of layer computes W + ΔW."""

import copy
import io
import pickle
from collections.abc import Iterable
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
from tests.support.parameters import (
    attributes_of_adapters,
    base_keys,
    base_parameters,
    classes,
    gradients,
)


@pytest.fixture(params=LAYERS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Any]:
    build, x = LAYERS[request.param]
    torch.manual_seed(0)
    return Model(build()).double(), x


def some(*kinds: str) -> Any:
    """These kinds of layers, where a rule does not depend on what the layer computes."""
    return pytest.mark.parametrize("case", kinds, indirect=True)


@pytest.mark.parametrize("pair", [(nn.Linear(2, 2), LoRALayer), (nn.Linear, nn.Linear)])
def test_what_are_no_classes_of_layers_and_adapters_is_not_registered(
    pair: Any,
) -> None:
    with pytest.raises(
        ll.ConfigError, match=r"register_adapter got .*Expected a class of layers, and"
    ):
        ll.register_adapter(*pair)


class LoRAOwn(LoRALayer):
    """An adapter of one's own."""

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, *, x: Tensor) -> Tensor:
        return x @ lora_A.T @ lora_B.T * self.lora_settings.scaling


def test_the_first_argument_of_ones_own_layer_may_have_any_name() -> None:
    own = type("Own", (Linear,), {})
    ll.register_adapter(own, LoRAOwn)
    model = nn.Sequential(own(5, 4))
    ll.inject_adapters(model, config(model, dropout=0.5))
    assert model[0](x=torch.ones(2, 5)).shape == (2, 4)


def same_objects(found: Iterable[object], expected: Iterable[object]) -> bool:
    return list(map(id, found)) == list(map(id, expected))


def disabled(model: nn.Module, x: Any) -> Tensor:
    with ll.disable_adapters(model):
        return model(x)


def test_adapters_change_nothing_while_fresh_or_disabled_and_leave_no_trace(
    case: tuple[nn.Sequential, Any],
) -> None:
    model, x = case
    before = model(x)
    layer = model[0]
    cls = type(layer)
    weights = list(model.parameters())
    model.requires_grad_(False)
    frozen = model(x)  # torch may round differently then
    values = state(model)
    calls = list[str]()
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    ll.inject_adapters(model, config(model))
    assert torch.equal(model(x), before)
    assert set(calls) == {"forward"}
    assert model[0] is layer
    assert isinstance(layer, cls)
    assert isinstance(layer, LoRALayer)
    assert same_objects(base_parameters(model).values(), weights)
    assert base_keys(model) == list(values)
    randomise(model)
    assert torch.equal(disabled(model, x), frozen)
    ll.merge_adapters(model)
    assert torch.equal(disabled(model, x), frozen)
    ll.unmerge_adapters(model)
    ll.remove_adapters(model)
    assert type(model[0]) is cls
    assert_state(model, values)
    assert torch.equal(model(x), frozen)
    for weight in weights:
        assert not weight.requires_grad
    assert attributes_of_adapters(model) == []


def zero_the_column_of_padding(layer: Any) -> None:
    """Put its column where it starts, and stays: the token's column has no gradient."""
    padding = getattr(layer, "padding_idx", None)
    if padding is not None:
        layer.lora_A.data[:, padding] = 0


def test_adapted_layer_computes_the_papers_equation_and_its_gradients(
    case: tuple[nn.Sequential, Any],
) -> None:
    model, x = case
    ll.inject_adapters(model, config(model))
    randomise(model)
    layer: Any = model[0]
    zero_the_column_of_padding(layer)
    lora = factors(layer)
    expected = reference(model, lora, x)
    for training in (False, True):
        model.train(training)
        output = model(x)
        torch.testing.assert_close(output, expected)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    found = gradients(layer)
    assert found.keys() == lora.keys()
    for name, factor in lora.items():
        torch.testing.assert_close(found[name], factor.grad)


def test_merged_computes_as_adapted_and_unmerging_is_exact(
    case: tuple[nn.Sequential, Any],
) -> None:
    model, x = case
    plain = copy.deepcopy(model)
    ll.inject_adapters(model, config(model))
    randomise(model)
    before = state(model)
    adapted = model(x)
    weights = list(model.parameters())
    base = base_parameters(model).values()
    ll.merge_adapters(model)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), adapted)
    assert same_objects(model.parameters(), base)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert classes(model) == classes(plain)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), adapted)
    kept = copy.deepcopy(model)
    ll.remove_adapters(kept)
    assert torch.equal(kept(x), plain(x))
    ll.unmerge_adapters(model)
    assert_state(model, before)
    assert same_objects(model.parameters(), weights)
    assert torch.equal(model(x), adapted)


def from_file(model: nn.Module) -> Any:
    """The model, saved as a whole and loaded."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@some("linear", "scaled", "padding convolution", "lstm", "attention", "experts")
@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_are_adapted_models_of_their_own(
    case: tuple[nn.Sequential, Any], merged: bool
) -> None:
    model, x = case
    plain = type(model[0])
    ll.inject_adapters(model, config(model))
    randomise(model)
    if merged:
        ll.merge_adapters(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), from_file(model)]
    expected = model(x)
    kind = type(model[0])
    randomise(model, seed=9)
    ll.remove_adapters(model)
    for each in copies:
        assert type(each[0]) is kind
        assert torch.equal(each(x), expected)
        ll.unmerge_adapters(each)
        ll.remove_adapters(each)
        assert type(each[0]) is plain


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="its compiler refuses some of them",
)
@some(
    "linear",
    "embedding",
    "scaled",
    "bag",
    "grouped convolution",
    "attention",
    "experts",
)
def test_compiled_layer_computes_the_same_adapted_merged_and_unmerged(
    case: tuple[nn.Sequential, Any],
) -> None:
    model, x = case
    torch._dynamo.reset()
    ll.inject_adapters(model, config(model))
    randomise(model)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    ll.merge_adapters(model)
    torch.testing.assert_close(compiled(x), expected)
    ll.unmerge_adapters(model)
    torch.testing.assert_close(compiled(x), expected)


def drawn(model: nn.Module, x: Any, times: int) -> Tensor:
    """What it computes so many times, from one seed on."""
    torch.manual_seed(1)
    outputs = [model(x) for _ in range(times)]
    return torch.stack(outputs)


def assert_mean(outputs: Tensor, expected: Tensor) -> None:
    """Expect this mean, as exactly as so many random outputs can tell."""
    deviation = outputs.std(dim=0) / len(outputs) ** 0.5
    error = (outputs.mean(dim=0) - expected).abs()
    rounding = 1e-4 * expected.abs().max()
    assert (error <= 6 * deviation + rounding).all()


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
def test_dropout_acts_in_training_alone_and_takes_nothing_away_on_average(
    case: tuple[nn.Sequential, Any],
) -> None:
    model, x = case
    plain = copy.deepcopy(model)
    ll.inject_adapters(model, config(model, dropout=0.5))
    ll.inject_adapters(plain, config(plain))
    randomise(model, scale=0.01)
    randomise(plain, scale=0.01)
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
    model.train()
    with torch.no_grad():
        outputs = drawn(model, x, times=200)
        assert torch.equal(drawn(model, x, times=1)[0], outputs[0])
    assert not torch.equal(outputs[0], outputs[1])
    assert_mean(outputs, expected)
