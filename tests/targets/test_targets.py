"""Patterns mean what PEFT's do, every entry must match, and a mistake is named with its nearest names."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import AdapterMismatchError, ConfigError, LoRAConfig, TargetError, inject_adapters, remove_adapters
from lightning_lora.layers import LoRALayer
from tests.models import LitTiny, TinyLM, same, state


def adapted(model: nn.Module, **config: Any) -> tuple[str, ...]:
    return inject_adapters(model, LoRAConfig(r=1, **config))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ("q_proj", "v_proj")),
        ("all", ("embed", "q_proj", "v_proj", "lm_head")),
        (["q_proj"], ("q_proj",)),
        (["v_proj", "q_proj"], ("q_proj", "v_proj")),
        (("embed", "lm_head"), ("embed", "lm_head")),
        ({"q_proj"}, ("q_proj",)),
        (r"[qv]_proj", ("q_proj", "v_proj")),
        (r".*(proj|norm)", ("q_proj", "v_proj")),
    ],
    ids=str,
)
def test_targets(targets: Any, expected: tuple[str, ...]) -> None:
    assert adapted(TinyLM(), target_modules=targets) == expected


def test_all_linear_leaves_a_transformers_output_head_out() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    assert "lm_head" not in adapted(llama)
    names = adapted(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=8)))
    assert names == tuple(
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )


def test_output_head_is_whatever_a_module_says_it_is() -> None:
    model: Any = nn.ModuleDict({"body": nn.Linear(4, 4), "words": nn.Linear(4, 8)})
    model["body"].get_output_embeddings = lambda: model["words"]
    assert adapted(model) == ("body",)


def test_exclude_takes_out_a_layer_or_everything_below_a_module() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    assert adapted(model, exclude_modules=["a"]) == ("b",)
    assert adapted(nn.ModuleDict({"c": nn.Linear(2, 2), "d": nn.Linear(2, 2)}), exclude_modules="d") == ("c",)


def test_modules_to_save_win_over_targets_and_train_whole() -> None:
    model = LitTiny()
    assert adapted(model, modules_to_save=["head"]) == ("q_proj", "v_proj")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("bias", "trained"), [("none", []), ("lora_only", ["q_proj.bias"]), ("all", ["q_proj.bias", "head.bias"])]
)
def test_bias(bias: Any, trained: list[str]) -> None:
    model = LitTiny()
    adapted(model, target_modules=["q_proj", "v_proj"], bias=bias)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name] == trained


def test_rank_and_alpha_patterns() -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2, alpha=4, rank_pattern={"v_proj": 4}, alpha_pattern={"q_.*": 8.0}))
    layers: Any = model
    assert (layers.q_proj.lora_A.shape, layers.v_proj.lora_A.shape) == ((2, 8), (4, 8))
    assert (layers.q_proj.lora_settings.scaling, layers.v_proj.lora_settings.scaling) == (4.0, 1.0)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"target_modules": ["q_porj"]},
        r"target_modules \['q_porj'\] match no module of LitTiny. Nearest names: 'q_proj'",
    ),
    ({"target_modules": ["q_proj", "nowhere"]}, r"target_modules \['nowhere'\]"),
    ({"target_modules": ["xyz"]}, r"Layers that can be adapted end in 'embed', 'q_proj', 'v_proj', 'head'"),
    ({"target_modules": "q_pr"}, r"Nearest names: 'q_proj'"),
    ({"exclude_modules": ["haed"]}, r"exclude_modules \['haed'\] .*'head'"),
    ({"modules_to_save": ["classifier"]}, r"modules_to_save \['classifier'\]"),
    ({"rank_pattern": {"k_proj": 2}}, r"rank_pattern \['k_proj'\] .*_proj"),
    ({"alpha_pattern": {"embed": 2.0}}, r"alpha_pattern \['embed'\]"),
    ({"target_modules": ["embed"], "exclude_modules": ["embed"]}, "select no layer of LitTiny"),
    ({"target_modules": ["head"], "modules_to_save": ["head"]}, "select no layer of LitTiny"),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES, ids=str)
def test_mistake_is_named_and_changes_nothing(config: dict[str, Any], message: str) -> None:
    model = LitTiny()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError, match=message):
        adapted(model, **config)
    assert same(state(model), before) and flags == [p.requires_grad for p in model.parameters()]
    assert not any(isinstance(module, LoRALayer) for module in model.modules())


def test_each_near_name_is_hinted_at_once() -> None:
    model = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(2, 2)}) for _ in range(2))
    with pytest.raises(TargetError, match=r"Nearest names: 'query' \(2 of them, such as '0.query'\)\. Correct"):
        adapted(model, target_modules=["qurey"])


def test_only_unsupported_layers_is_an_error_that_lists_the_supported() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    for targets in ("all-linear", "all", ["0"], "0|1"):
        with pytest.raises(TargetError, match=r"Linear, Linear4bit, .*Conv1D, Embedding"):
            adapted(model, target_modules=targets)


def test_rank_above_a_layers_smaller_side_is_refused_with_its_remedies() -> None:
    model = LitTiny()
    with pytest.raises(ConfigError, match=r"'head' \(r=8, at most 4\).*modules_to_save=\['head'\].*\{'head': 4\}"):
        inject_adapters(model, LoRAConfig(r=8))
    inject_adapters(model, LoRAConfig(r=8, rank_pattern={"head": 4}))


def test_shared_layer_is_adapted_once_under_either_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["b"] = model["a"]
    assert adapted(model, target_modules=["b"]) == ("a",)
    assert adapted(model, target_modules=["b"]) == ("a",)
    remove_adapters(model)
    assert adapted(model) == ("a",)
    assert adapted(model) == ("a",)


def test_shared_layer_is_left_out_under_either_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(2, 2))})
    for left_out in ({"exclude_modules": ["a"]}, {"exclude_modules": ["b.0"]}):
        assert adapted(model, **left_out) == ("b.1",)
        remove_adapters(model)
    with pytest.raises(TargetError):
        adapted(model, modules_to_save=["b"])


def test_injection_is_idempotent_and_takes_in_new_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = LoRAConfig(r=2, modules_to_save=None)
    inject_adapters(model, config)
    factor = model[0].lora_A
    model.append(nn.Linear(4, 4))
    assert inject_adapters(model, config) == ("0", "1")
    assert model[0].lora_A is factor and not model[1].weight.requires_grad


@pytest.mark.parametrize(
    "other",
    [
        {"r": 1},
        {"alpha": 7},
        {"dropout": 0.1},
        {"target_modules": ["v_proj"]},
        {"modules_to_save": ["head"]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_another_config_on_an_adapted_model_is_refused(other: dict[str, Any]) -> None:
    model, config = LitTiny(), {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    inject_adapters(model, LoRAConfig(**config))
    before = state(model)
    with pytest.raises(AdapterMismatchError, match="adapted already"):
        inject_adapters(model, LoRAConfig(**(config | other)))
    assert same(state(model), before)


def test_adapters_injected_in_a_part_belong_to_the_whole_afterwards() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
    config = LoRAConfig(r=2)
    inject_adapters(model["body"], config)
    inject_adapters(model, config)
    inject_adapters(model["body"], config)
    inject_adapters(model, config)
    with pytest.raises(AdapterMismatchError, match="modules_to_save"):
        inject_adapters(model, LoRAConfig(r=2, bias="all"))
    remove_adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, LoRALayer) for module in model.modules())


def test_injecting_something_else_is_an_error() -> None:
    with pytest.raises(ConfigError, match="LoRAConfig"):
        inject_adapters(nn.Linear(2, 2), {"r": 8})  # type: ignore[arg-type]


def test_gpt3_has_the_papers_parameter_counts() -> None:
    """Hu et al. 2021, table 4: W_q and W_v of 96 layers of width 12,288; 4.7 M at r=1, 37.7 M at r=8."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(12288, 12288, bias=False) for _ in "qkvo")

    for r, expected in ((1, 4_718_592), (8, 37_748_736)):
        with torch.device("meta"):
            model = nn.Sequential(*(Attention() for _ in range(96)))
        assert len(inject_adapters(model, LoRAConfig(r=r, target_modules=["q", "v"]))) == 192
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


HINTS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": "conv"}, r"is an expression.*give a list: target_modules=\['conv'\]"),
    ({}, r"others that can be adapted: Conv2d \('0.conv'\), LSTM \('0.lstm'\).*target_modules='all'"),
    ({"target_modules": ["scale"]}, r"'0\.scale' is a parameter: name it in target_parameters"),
    ({"target_parameters": ["conv"]}, r"match no parameter.*Name parameters, such as '0\.conv\.weight'"),
    ({"target_modules": ["conv"], "rank_pattern": {"lstm": 1}}, r"\['lstm'\] match layers.*not adapted"),
    ({"target_modules": ["0"]}, r"a Sensor is not supported \(.*: '0.conv'\), but target_parameters.* '0\.scale'"),
]


class Sensor(nn.Module):
    """A model of layers that are not linear, and of a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.scale = nn.Conv2d(3, 4, 3), nn.LSTM(4, 4), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Any) -> Any:
        return self.lstm(self.conv(x).flatten(2).mT)


@pytest.mark.parametrize(("arguments", "words"), HINTS, ids=str)
def test_refusal_says_what_to_write_instead(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        adapted(nn.Sequential(Sensor()), **arguments)
