"""Architectures that others wrote are adapted, trained, merged and restored."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.model.view import View
from tests.support.compared import assert_all_have_moved, assert_same_tensors
from tests.support.layers import is_float
from tests.support.models import randomise, same, state, trainer
from tests.support.parameters import base_of, classes, trainable

IDS = torch.arange(12).view(2, 6) % 11 + 3
IMAGES = torch.linspace(-300, 300, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
WAVE = torch.linspace(0, 40, 2 * 400).sin().view(2, 400)

TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TEXT |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: dict[str, Any]
    targets: str = "all"
    parameters: list[str] | None = None
    dtype: torch.dtype = torch.float64

    @property
    def config(self) -> dict[str, Any]:
        return {"target_modules": self.targets, "target_parameters": self.parameters}


WORDS = {"input_ids": IDS, "labels": IDS}


def hub(
    name: str, sizes: dict[str, Any], inputs: dict[str, Any] = WORDS, **case: Any
) -> Case:
    """One of transformers' models."""
    cls = getattr(transformers, name)
    return Case(lambda: cls(cls.config_class(**sizes)), inputs, "all-linear", **case)


def vision(build: Callable[[Any], nn.Module], **case: Any) -> Case:
    """One of torchvision's models."""
    return Case(
        lambda: build(importlib.import_module("torchvision.models")),
        {"x": IMAGES},
        **case,
    )


T5 = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
WAV2VEC: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "layerdrop": 0.0,
}
WAV2VEC |= {
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
MAMBA = {
    "vocab_size": 20,
    "hidden_size": 8,
    "state_size": 4,
    "num_hidden_layers": 1,
    "time_step_rank": 4,
}
CASES = {
    "gpt2": hub("GPT2LMHeadModel", TEXT | {"n_embd": 8, "n_layer": 1, "n_head": 2}),
    "t5": hub("T5ForConditionalGeneration", {"vocab_size": 20} | T5),
    "wav2vec2": hub(
        "Wav2Vec2ForCTC",
        TEXT | WAV2VEC | {"mask_time_prob": 0.0},
        {"input_values": WAVE, "labels": IDS},
    ),
    # the grouped products of its experts are not for float64
    "mixtral": hub(
        "MixtralForCausalLM",
        TEXT | {"num_key_value_heads": 1, "num_local_experts": 3},
        parameters=["gate_up_proj", "down_proj"],
        dtype=torch.float32,
    ),
    # its mixer multiplies by the weight of dt_proj itself, and never calls that layer
    "mamba": hub("MambaForCausalLM", MAMBA, parameters=["dt_proj.weight"]),
    "torchvision mobilenet": vision(
        lambda v: v.mobilenet_v3_small(num_classes=4, width_mult=0.5)
    ),
    # its attention multiplies by the weights of qkv and proj itself, and never calls
    # these layers
    "torchvision swin": vision(
        lambda v: v.SwinTransformer([4, 4], 8, [2, 1], [1, 2], [4, 4], num_classes=4),
        parameters=["attn.qkv.weight", "attn.proj.weight"],
    ),
}


class Lit(L.LightningModule):
    """An architecture, always with the same weights, and with its own example as every batch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.case = CASES[name]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            self.net = self.case.build()
            self.fill_zeros()
            self.measure_statistics()

    def fill_zeros(self) -> None:
        """Some heads start with zeros, through which nothing would be seen."""
        for p in self.parameters():
            if not p.any():
                p.normal_(std=0.1)

    def measure_statistics(self) -> None:
        """Let the statistics of all norms be those of the one batch."""
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        for norm in norms:
            norm.momentum = None
        if norms:
            self()

    def forward(self) -> Any:
        dtype = next(self.parameters()).dtype

        def converted(x: Any) -> Any:
            return x.to(dtype) if is_float(x) else x

        return self.net(**tree_map(converted, self.case.inputs))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output = self()
        if isinstance(output, dict) and "loss" in output:
            return output["loss"]
        scores = tree_leaves(output)[0].flatten(0, -2)  # that all is of class zero
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


@torch.no_grad()
def run(model: Lit) -> Tensor:
    """All that the model puts out in eval mode, as one vector."""
    outputs = tree_leaves(model.eval()())
    return torch.cat([x.flatten() for x in outputs if is_float(x)])


FAST = "torch.backends.mha._is_fastpath_enabled"


@pytest.fixture(params=CASES, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("torchvision"):
        pytest.importorskip("torchvision")
    if request.param == "mixtral" and Version(transformers.__version__) < Version("5"):
        pytest.skip("its experts are modules there, each with linear layers")
    return request.param


@pytest.fixture
def config(name: str) -> ll.LoRAConfig:
    return ll.LoRAConfig(r=2, **CASES[name].config)


def test_adapters_change_nothing_are_merged_and_kept_in_a_file_and_come_off(
    name: str, config: ll.LoRAConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    # which rounds in its own way, as torch's products with weights that train
    monkeypatch.setattr(FAST, False)
    model = Lit(name).to(CASES[name].dtype).requires_grad_(False)
    other = copy.deepcopy(model)
    before = state(model)
    output = run(model)
    classes_before = classes(model)
    ll.inject_adapters(model, config)
    assert torch.equal(run(model), output)
    assert_same_tensors(base_of(state(model)), before)
    randomise(model)
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    with_adapters = state(model)
    adapted = run(model)
    assert not torch.equal(adapted, output)
    ll.merge_adapters(model)
    monkeypatch.setattr(FAST, True)
    torch.testing.assert_close(run(model), adapted)
    ll.unmerge_adapters(model)
    torch.testing.assert_close(run(model), adapted)
    monkeypatch.setattr(FAST, False)
    assert same(state(model), with_adapters)
    assert torch.equal(run(model), adapted)
    ll.load_adapter(other, tmp_path / "adapter.safetensors")
    assert same(ll.adapter_state_dict(other), ll.adapter_state_dict(model))
    # processors round other copies of a weight in other ways
    torch.testing.assert_close(run(other), adapted)
    ll.remove_adapters(model)
    assert same(state(model), before)
    assert classes(model) == classes_before
    assert torch.equal(run(model), output)
    assert trainable(model) == []


# they are random on purpose
@pytest.mark.filterwarnings("ignore::lightning_lora.FreshLayerWarning")
# of so small a ViT
@pytest.mark.filterwarnings(
    "ignore:.*leaves .* of the weights:lightning_lora.LoRAWarning"
)
def test_training_moves_adapters_alone(name: str, tmp_path: Path) -> None:
    model = Lit(name)
    before = state(model)
    output = run(model)
    callback = ll.LoRACallback(r=2, merge=False, **CASES[name].config)
    trainer(tmp_path, [callback], max_steps=3, enable_checkpointing=False).fit(
        model.train(), DataLoader(range(6))
    )
    assert_same_tensors(base_of(state(model)), before)
    assert_all_have_moved(model, View(model).adapter_parameters)
    assert not torch.equal(run(model), output)


@pytest.mark.filterwarnings("ignore:.*writes merged weights:lightning_lora.LoRAWarning")
@pytest.mark.parametrize(
    "name", ["gpt2", "wav2vec2", "mixtral", "mamba"], indirect=True
)
def test_save_pretrained_gives_a_model_that_computes_the_same(
    name: str, config: ll.LoRAConfig, tmp_path: Path
) -> None:
    model = Lit(name)
    again = Lit(name)
    ll.inject_adapters(model, config)
    randomise(model)
    model.net.save_pretrained(tmp_path)
    again.net, about = type(model.net).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(about.values())
    torch.testing.assert_close(run(again), run(model))
