"""Types of models of transformers of which PEFT adapts some layers otherwise, or not: named before and after a fit."""

import json
import logging
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import lightning_lora as ll
from lightning_lora.model.view import view_of
from lightning_lora.moments import Guards
from lightning_lora.storage.formats.peft.naming.shells import shell_of
from lightning_lora.storage.stored_modules import StoredModule
from lightning_lora.training.untrained_at_start import tell_of_start
from tests.storage.formats.test_export_models import load_adapter, run
from tests.storage.formats.test_same_folders import assert_same, of_0_2_0
from tests.support.models import Around
from tests.support.peft_export import check_equal, read, trained
from tests.support.storage import rewrite

if not hasattr(hf, "Glm4MoeConfig") or int(hf.__version__.partition(".")[0]) < 5:
    pytest.skip("experts are modules there", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* would leave out:lightning_lora.LoRAWarning"
)

WeightRenaming = pytest.importorskip("transformers.core_model_loading").WeightRenaming

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "pad_token_id": 0}
DECODER = {
    **SMALL,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS = {**DECODER, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
GATED = ["gate_proj", "up_proj", "down_proj"]
EACH = ["experts.gate_up_proj", "experts.down_proj"]
MOE = ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0]})
MAMBA = ("Mamba", {**SMALL, "state_size": 4})
NOT_AS_PARAMETER = (
    "layers.0.mlp.down_proj.*experts .*'qwen3_moe'.*use_dora=False and dropout=0"
)
CASES: list[tuple[tuple[str, dict[str, Any]], dict[str, Any], str]] = [
    (MOE, {"use_dora": True}, NOT_AS_PARAMETER),
    (MOE, {"dropout": 0.1}, NOT_AS_PARAMETER),
    (MAMBA, {}, r"PEFT refuses 'out_proj' .*'mamba'.*exclude_modules=\['out_proj'\]"),
]


def tiny(kind: str, sizes: dict[str, Any]) -> Any:
    config = getattr(hf, f"{kind}Config")(**sizes)
    torch.manual_seed(1)
    return getattr(hf, f"{kind}ForCausalLM")(config).eval()


def is_advised_against(model: Any, config: dict[str, Any], caplog: Any) -> bool:
    """Whether an injection says that export_peft will refuse a layer."""
    caplog.clear()
    module = Around(deepcopy(model))
    ll.inject_adapters(module, ll.LoRAConfig(r=2, **config))
    tell_of_start(view_of(module), Guards())
    return "export_peft refuses 'model." in caplog.text


def assert_moved(model: Any, base: Any) -> None:
    """Expect the adapters to do something."""
    plain = run(base)
    assert (run(model) - plain).norm() > 1e-4 * plain.norm()


@pytest.mark.filterwarnings(
    "ignore:target_modules=|For .* pass uniform=True:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize(("model", "config", "match"), CASES)
def test_what_peft_does_not_hold_is_named(
    model: tuple[str, dict[str, Any]],
    config: dict[str, Any],
    match: str,
    tmp_path: Path,
    caplog: Any,
) -> None:
    caplog.set_level(logging.INFO)
    base = tiny(*model)
    assert is_advised_against(base, config, caplog)
    adapted = trained(base, ll.LoRAConfig(r=2, **config), scale=0.1)
    with pytest.raises(ll.ExportError, match=match):
        ll.export_peft(adapted, tmp_path / "peft")


ADVISED: list[tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = [
    (MOE, {"exclude_modules": GATED, "use_dora": True}),
    (MOE, {"exclude_modules": GATED, "target_parameters": EACH}),
    (MAMBA, {"exclude_modules": ["out_proj"]}),
]


@pytest.mark.filterwarnings(
    "ignore:target_modules=|For .* pass uniform=True|.* would leave "
    "out:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize(("model", "config"), ADVISED)
@torch.no_grad()
def test_the_advice_on_what_peft_does_not_hold_is_right(
    model: tuple[str, dict[str, Any]],
    config: dict[str, Any],
    tmp_path: Path,
    caplog: Any,
) -> None:
    caplog.set_level(logging.INFO)
    base = tiny(*model)
    assert not is_advised_against(base, config, caplog)
    check_arrives(base, config, tmp_path)


def check_arrives(base: Any, config: dict[str, Any], tmp_path: Path) -> None:
    """Expect the same outputs of peft, of transformers and of this package again."""
    model = trained(base, ll.LoRAConfig(r=2, **config), scale=0.1)
    assert_moved(model, base)
    here = run(model)
    ll.export_peft(model, tmp_path / "peft")
    check_equal(run(read(base, tmp_path / "peft")), here)
    check_equal(run(load_adapter(base, tmp_path / "peft")), here)
    again = deepcopy(base)
    ll.load_adapter(again, tmp_path / "peft")
    check_equal(run(again.eval()), here)


# Layers that peft takes for experts


LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
ROUTED = {
    **EXPERTS,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {
    **LAYERS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
BESIDE_EXPERTS = {
    "DeepseekV3": {**ROUTED, **LATENT},
    "Glm4Moe": {**ROUTED, "head_dim": 8},
    "Qwen3Next": {
        **EXPERTS,
        **LINEAR,
        "num_experts": 4,
        "shared_expert_intermediate_size": 8,
        "head_dim": 8,
    },
    "Ernie4_5_Moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "Dots1": {**ROUTED, "n_shared_experts": 1},
}


@pytest.mark.filterwarnings(
    "ignore:For .* pass uniform=True:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize("kind", BESIDE_EXPERTS)
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "rank_pattern": {"up_proj": 3}, "bias": "all"}]
)
@torch.no_grad()
def test_the_default_arrives_beside_experts(
    kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny(kind, BESIDE_EXPERTS[kind])
    check_arrives(base, config, tmp_path)
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert all(name.endswith("_proj.weight") for name in written["target_parameters"])
    assert not any(name.endswith("down_proj") for name in written["target_modules"])


# Tensors that peft gives other names


LAGUNA = {
    **EXPERTS,
    "num_experts": 4,
    "shared_expert_intermediate_size": 8,
    "head_dim": 8,
}


@pytest.mark.filterwarnings(
    "ignore:For .* pass uniform=True:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize(
    "config",
    [{}, {"target_modules": "all"}, {"exclude_modules": GATED, "use_dora": True}],
)
@torch.no_grad()
def test_tensors_are_written_under_names_that_arrive(
    config: dict[str, Any], tmp_path: Path
) -> None:
    check_arrives(tiny("Laguna", LAGUNA), config, tmp_path)


@torch.no_grad()
def test_what_no_name_in_a_file_becomes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny("Laguna", LAGUNA), ll.LoRAConfig(r=2))
    # it does not know the way back
    monkeypatch.setattr(WeightRenaming, "reverse_transform", deepcopy)
    with pytest.raises(
        ll.ExportError,
        match=r"shared_experts.gate_proj'.* PEFT gives .* other names .*'laguna'",
    ):
        ll.export_peft(model, tmp_path / "peft")


@torch.no_grad()
def test_a_tensor_beside_factors_that_does_not_arrive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converts = pytest.importorskip("peft.utils.transformers_weight_conversion")
    known = converts.get_model_conversion_mapping
    more = WeightRenaming("lora_magnitude_vector", "scale")
    monkeypatch.setattr(
        converts, "get_model_conversion_mapping", lambda model: [*known(model), more]
    )
    model = trained(
        tiny("Laguna", LAGUNA), ll.LoRAConfig(r=2, use_dora=True, exclude_modules=GATED)
    )
    with pytest.raises(
        ll.ExportError,
        match=r"lora_magnitude_vector.weight'.* other names .*: they would not arrive",
    ):
        ll.export_peft(model, tmp_path / "peft")


# Files, which say of which models they are


@pytest.mark.filterwarnings(
    "ignore:For .* pass uniform=True:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize("kind", ["Laguna", "Glm4Moe"])
@torch.no_grad()
def test_a_file_is_written_for_its_type_of_model(kind: str, tmp_path: Path) -> None:
    base = tiny(kind, {**BESIDE_EXPERTS, "Laguna": LAGUNA}[kind])
    model = trained(base, ll.LoRAConfig(r=2), scale=0.1)
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    ll.export_peft(tmp_path / "adapter.safetensors", tmp_path / "peft")
    check_equal(run(read(base, tmp_path / "peft")), run(model))


def test_a_file_gives_the_same_folder_if_tensors_are_renamed(tmp_path: Path) -> None:
    base = tiny("Laguna", {**LAGUNA, "attention_bias": True})
    assert_same(trained(base, ll.LoRAConfig(r=2, bias="all")), tmp_path)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_one_class_of_models_serves_two_types(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT takes no layer of a Sarvam MoE for experts, as it does with a GLM-4 MoE, whose class it has."""
    pytest.importorskip("transformers.models.sarvam_moe")
    type_of_model = hf.AutoConfig.for_model("sarvam_moe", **BESIDE_EXPERTS["Glm4Moe"])
    base = hf.Glm4MoeForCausalLM(type_of_model).eval()
    model = trained(base, ll.LoRAConfig(r=2, **config), scale=0.1)
    here = run(model)
    assert_same(model, tmp_path)
    check_equal(run(read(base, tmp_path / "of_file")), here)


@pytest.mark.filterwarnings(
    "ignore:For .* pass uniform=True:lightning_lora.LoRAWarning"
)
@torch.no_grad()
def test_a_file_of_0_2_0_does_not_say_its_type(tmp_path: Path) -> None:
    base = tiny(
        "Qwen2Moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8}
    )
    model = trained(base, ll.LoRAConfig(r=2), scale=0.1)
    file = tmp_path / "adapter.safetensors"
    ll.save_adapter(model, file)
    rewrite(file, of_0_2_0)
    with pytest.warns(
        ll.LoRAWarning,
        match=r"does not say for which type .*Load the file onto its model",
    ):
        ll.export_peft(file, tmp_path / "peft")
    check_equal(run(read(base, tmp_path / "peft")), run(model))


@pytest.mark.filterwarnings(
    "ignore:For .* pass uniform=True:lightning_lora.LoRAWarning"
)
def test_without_peft_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # it is not installed
    model = trained(tiny(*MAMBA), ll.LoRAConfig(r=2))
    with pytest.warns(
        ll.LoRAWarning, match="onto a mamba. PEFT is not installed here.* Install peft"
    ):
        ll.export_peft(model, tmp_path / "peft")


def vlm() -> Any:
    """Gemma 3, whose vision tower has a pooling head with an nn.MultiheadAttention."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = hf.Gemma3Config(
        text_config={**DECODER, "head_dim": 8, "vocab_size": 60},
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=50,
    )
    torch.manual_seed(2)
    return hf.Gemma3ForConditionalGeneration(config).eval()


def zero_updates_of(model: Any, name: str) -> None:
    """Leave the adapters of this part as if it were not trained."""
    for own, p in model.named_parameters():
        if name in own and "lora_B" in own:
            p.data.zero_()


@torch.no_grad()
def test_updates_of_zero_that_peft_cannot_hold_are_left_out(tmp_path: Path) -> None:
    base = vlm()
    model = trained(base, ll.LoRAConfig(r=2), scale=0.1)
    with pytest.raises(
        ll.ExportError, match=r"head.attention.*adds the update .* twice"
    ):
        ll.export_peft(model, tmp_path / "peft")
    zero_updates_of(model, "vision_tower")  # it was trained on text
    with pytest.warns(
        ll.LoRAWarning, match="head.attention' have updates of zero.*left out"
    ) as told:
        ll.export_peft(model, tmp_path / "peft")
    assert len(told) == 1
    assert_moved(model, base)
    check_equal(run(read(base, tmp_path / "peft")), run(model))
    again = vlm()
    ll.load_adapter(again, tmp_path / "peft")
    check_equal(run(again), run(model))
    only = trained(base, ll.LoRAConfig(r=2, target_modules=["head.attention"]), scale=0)
    with pytest.raises(ll.ExportError, match="twice"):
        ll.export_peft(only, tmp_path / "other")


@pytest.mark.parametrize("name", ["logger", "BertConfig", "nothing", "BertPooler"])
def test_what_a_file_calls_its_model_is_not_made_unless_it_is_one(name: str) -> None:
    classes = (
        f"transformers.models.bert.modeling_bert.{name}",
        "transformers.modeling_utils.PreTrainedModel",
    )
    with pytest.raises(ImportError, match=f"transformers has no model {name}"):
        shell_of({"": StoredModule(classes)})
