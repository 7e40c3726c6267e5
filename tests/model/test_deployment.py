"""What torch's ways to deploy a model make of adapted layers."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.jit and torch.ao

INPUT = torch.linspace(-1, 1, 24).view(3, 8)


def adapted() -> nn.Module:
    """A small network with one adapted layer and one without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    randomise(model)
    return model.eval()


def merged() -> nn.Module:
    model = adapted()
    ll.merge_adapters(model)
    return model


def export(model: nn.Module) -> Any:
    return torch.export.export(model, (INPUT,)).module()


def trace(model: nn.Module) -> Any:
    return torch.jit.trace(model, INPUT)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def symbolic(model: nn.Module) -> Any:
    """The graph of torch.fx.

    Without gradients, an adapted layer asks for the length of its input, which has
    none.
    """
    with torch.enable_grad():
        return torch.fx.symbolic_trace(model)


class Onnx:
    """A model as onnxruntime computes it."""

    def __init__(self, model: nn.Module, path: Path, *inputs: Tensor) -> None:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        torch.onnx.export(model, inputs, dynamo=True, verbose=False).save(path)
        self.session = runtime.InferenceSession(
            path, providers=["CPUExecutionProvider"]
        )

    def __call__(self, x: Tensor) -> Tensor:
        (name,) = [each.name for each in self.session.get_inputs()]
        given = {name: x.numpy()}
        outputs, *_ = self.session.run(None, given)
        return torch.from_numpy(outputs)


def quantised_layers(model: nn.Module) -> list[bool]:
    """Whether each of both layers is quantised by torch."""
    quantised = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {nn.Linear}
    )
    kind = torch.ao.nn.quantized.dynamic.Linear
    return [isinstance(quantised.get_submodule(name), kind) for name in ("0", "2")]


@pytest.mark.parametrize("deploy", [export, trace, compiled, symbolic])
@torch.no_grad()
def test_a_deployed_model_computes_the_adapters(
    deploy: Callable[[nn.Module], Any],
) -> None:
    model = adapted()
    here: Tensor = model(INPUT)
    torch.testing.assert_close(deploy(model)(INPUT), here)
    with ll.disable_adapters(model):
        base: Tensor = model(INPUT)
    assert (here - base).abs().max() > 1e-3


@torch.no_grad()
def test_a_script_needs_merged_weights() -> None:
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(adapted())
    scripted = torch.jit.script(merged())
    torch.testing.assert_close(scripted(INPUT), adapted()(INPUT))


def test_torch_quantises_merged_layers_only() -> None:
    assert quantised_layers(adapted()) == [False, True]
    assert quantised_layers(merged()) == [True, True]


def test_a_symbolic_trace_without_gradients_needs_merged_weights() -> None:
    with torch.no_grad():
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(adapted())
        traced = torch.fx.symbolic_trace(merged())
        torch.testing.assert_close(traced(INPUT), adapted()(INPUT))


@pytest.mark.parametrize("adapts", [False, True])
def test_torch_cannot_trace_models_of_transformers_adapted_or_not(adapts: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=10)
    )
    if adapts:
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises((ValueError, torch.fx.proxy.TraceError)):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("deploy", [export, trace, symbolic])
@torch.no_grad()
def test_a_merge_after_a_trace_counts_twice_in_it(
    deploy: Callable[[nn.Module], Any],
) -> None:
    """It shares the weights of the model, as torch makes it: the page says to merge before."""
    model = adapted()
    here: Tensor = model(INPUT)
    deployed = deploy(model)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(INPUT), here)
    assert (deployed(INPUT) - here).abs().max() > 1e-3
    ll.unmerge_adapters(model)
    torch.testing.assert_close(deployed(INPUT), here)


@pytest.mark.parametrize("make", [adapted, merged])
@torch.no_grad()
def test_onnxruntime_computes_the_adapters(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    exported = Onnx(make(), tmp_path / "model.onnx", INPUT)
    difference = exported(INPUT) - adapted()(INPUT)
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize("merges", [False, True])
@torch.no_grad()
def test_onnxruntime_computes_an_adapted_transformer(
    merges: bool, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(**sizes, vocab_size=60)
    ).eval()
    ids = torch.arange(2, 14).view(2, 6)
    base: Tensor = model(ids)[0]
    config = ll.LoRAConfig(r=2, target_modules=["query", "value", "dense"])
    ll.inject_adapters(model, config)
    randomise(model, scale=0.1)
    here: Tensor = model(ids)[0]
    if merges:
        ll.merge_adapters(model)
    there = Onnx(model, tmp_path / "model.onnx", ids)(ids)
    assert (here - base).norm() > 1e-2 * base.norm()
    assert (there - here).norm() <= 1e-6 * here.norm()


PLAIN_PROGRAM = """
import sys
sys.modules["lightning_lora"] = None    # to import it is an error
import torch
from torch import nn

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
model.load_state_dict(torch.load("plain.pt"))
outputs = model(torch.load("input.pt"))
torch.save(outputs.detach(), "outputs.pt")
"""


@torch.no_grad()
def test_a_program_without_this_package_computes_the_same(tmp_path: Path) -> None:
    torch.save(merged().state_dict(), tmp_path / "plain.pt")
    torch.save(INPUT, tmp_path / "input.pt")
    subprocess.run([sys.executable, "-c", PLAIN_PROGRAM], cwd=tmp_path, check=True)
    outputs = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(outputs, adapted()(INPUT))
