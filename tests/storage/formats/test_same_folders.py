"""A file of adapters and the model that it is from give the same folder, and the same warnings."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM

import lightning_lora as ll
from lightning_lora.cli.main import main
from tests.storage.formats.test_export_models import run, tiny
from tests.support.models import Around, LitTiny, data, lora, trainer
from tests.support.peft_export import check_equal, contents, trained
from tests.support.storage import rewrite

LIBRARY = "transformers.models.llama.modeling_llama"
QV = {"target_modules": ["q_proj", "v_proj"]}


def export(source: Any, folder: Path, **kwargs: Any) -> str:
    """Export a model or a file. Return what is warned of, a line for each warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ll.export_peft(source, folder, **kwargs)
    messages = ""
    for each in told:
        messages += f"{each.message}\n"
    return messages


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    """A trained copy of a model, with adapters of rank 2."""
    return trained(model, ll.LoRAConfig(r=2, **config))


def linear_layers(*names: str) -> nn.ModuleDict:
    """Layers with these names."""
    layers = nn.ModuleDict()
    for name in names:
        layers[name] = nn.Linear(4, 4)
    return layers


def assert_same(model: nn.Module, folder: Path, **kwargs: Any) -> str:
    """Expect the same of a model, of its file, and of the merged model.

    Return the warnings.
    """
    file = folder / "adapter.safetensors"
    ll.save_adapter(model, file)
    told = export(model, folder / "of_model", **kwargs)
    assert export(file, folder / "of_file", **kwargs) == told
    expected = contents(folder / "of_model")
    assert contents(folder / "of_file") == expected
    ll.merge_adapters(model)
    assert export(model, folder / "of_merged", **kwargs) == told
    assert contents(folder / "of_merged") == expected
    return told


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """A tiny Llama from a folder."""
    model = tiny("Llama", "ForCausalLM")
    model.save_pretrained(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base").eval()


SCALED: dict[str, Any] = {
    "alpha_pattern": {"layers.1.*": 4},
    "rank_pattern": {"q_proj": 1},
}
LLAMA: list[dict[str, Any]] = [
    QV,
    {**QV, "use_rslora": True, "bias": "all"},
    {**QV, **SCALED},
    {**QV, "modules_to_save": ["layers.1.mlp"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
]


@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    ("root", "name"), [(None, "LlamaForCausalLM"), ("model.model", "LlamaModel")]
)
@pytest.mark.parametrize("config", LLAMA)
def test_a_language_model(
    config: Any, root: Any, name: str, uniform: bool, base: Any, tmp_path: Path
) -> None:
    model = adapted(Around(base), **config)
    told = assert_same(model, tmp_path, root=root, uniform=uniform)
    written = config_in(tmp_path / "of_file")
    assert isinstance(written["target_modules"], list)  # SGLang refuses an expression
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    assert written["auto_mapping"] == {
        "base_model_class": name,
        "parent_library": LIBRARY,
    }
    is_scaled_otherwise = not config.keys().isdisjoint(("use_rslora", "alpha_pattern"))
    assert ("pass uniform=True" in told) == (
        is_scaled_otherwise and root is None and not uniform
    )


def test_the_whole_module_has_no_name(base: Any, tmp_path: Path) -> None:
    assert_same(adapted(Around(base), **QV), tmp_path, root="")
    assert config_in(tmp_path / "of_file")["base_model_name_or_path"] is None


WHOLE: list[tuple[str, str, str, bool]] = [
    ("Llama", "ForCausalLM", "model.norm", True),
    ("GPT2", "LMHeadModel", "transformer.ln_f", True),
    ("Llama", "ForSequenceClassification", "score", True),
    ("Llama", "Model", "embed_tokens", False),
    ("Bert", "ForSequenceClassification", "classifier", False),
]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("kind", "head", "whole", "is_served"), WHOLE)
def test_whole_modules_that_servers_drop_are_named(
    kind: str, head: str, whole: str, is_served: bool, uniform: bool, tmp_path: Path
) -> None:
    linear = r".*(layers\.1\..*_proj|attention\.self\.query|c_attn)"
    base = Around(tiny(kind, head))
    model = adapted(base, target_modules=linear, modules_to_save=[whole])
    told = assert_same(model, tmp_path, uniform=uniform)
    assert (
        told.count(
            f"The folder holds 'model.{whole}' whole (modules_to_save), for PEFT and "
            "transformers."
        )
        == is_served
    )
    assert told.count("without a word (SGLang, TGI, LoRAX, llama.cpp)") == is_served


class Nested(nn.Module):
    """Layers whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.inner = linear_layers("q", "k")
        self.out_k = nn.Linear(4, 4)


NESTED: list[tuple[dict[str, Any], list[str] | str]] = [
    ({"target_modules": "q"}, "q"),
    ({"target_modules": ["q"]}, ["q", "inner.q"]),
    ({"target_modules": "inner.k"}, ["inner.k"]),
]


@pytest.mark.parametrize(("config", "targets"), NESTED)
def test_a_name_that_is_the_end_of_another_is_an_expression(
    config: Any, targets: Any, tmp_path: Path
) -> None:
    assert_same(adapted(Nested(), **config), tmp_path)
    assert config_in(tmp_path / "of_file")["target_modules"] == targets


def test_a_saved_module_whose_name_is_the_end_of_another_is_refused(
    tmp_path: Path,
) -> None:
    model = adapted(
        linear_layers("q", "k", "out_k"), target_modules=["q"], modules_to_save=["k"]
    )
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    for source in (model, tmp_path / "adapter.safetensors"):
        with pytest.raises(ll.ExportError, match="would also save 'out_k'"):
            ll.export_peft(source, tmp_path / "peft")


class OwnLayer(nn.TransformerEncoderLayer):
    """A class that inherits from torch's."""


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, OwnLayer])
def test_layers_that_read_past_peft_are_named(kind: Any, tmp_path: Path) -> None:
    model = nn.Sequential(kind(8, 2, 8, batch_first=True))
    told = assert_same(adapted(model, target_modules=["linear1"]), tmp_path)
    assert told.startswith("'0' are layers of nn.TransformerEncoder")


# which peft asks for
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@torch.no_grad()
def test_peft_and_transformers_find_the_base_of_a_file(
    base: Any, tmp_path: Path
) -> None:
    model = adapted(Around(base), **QV)
    file = tmp_path / "adapter.safetensors"
    ll.save_adapter(model, file)
    assert main(["export", str(file), str(tmp_path / "peft")]) == 0
    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        found = auto_class.from_pretrained(tmp_path / "peft").eval()
        check_equal(run(found), run(model.model))


def test_the_base_has_the_name_that_is_given(base: Any, tmp_path: Path) -> None:
    model = adapted(Around(base), **QV)
    assert_same(model, tmp_path, base_name="me/tiny")
    assert config_in(tmp_path / "of_file")["base_model_name_or_path"] == "me/tiny"
    assert config_in(tmp_path / "of_file")["auto_mapping"]["parent_library"] == LIBRARY
    file = str(tmp_path / "adapter.safetensors")
    assert main(["export", file, str(tmp_path / "peft"), "--base-name", "me/tiny"]) == 0
    assert contents(tmp_path / "peft") == contents(tmp_path / "of_file")
    ll.export_peft(file, tmp_path / "none", base_name="")
    assert config_in(tmp_path / "none")["base_model_name_or_path"] is None


def of_0_2_0(about: dict[str, Any], _: Any) -> None:
    """Leave out what files of 0.2.0 do not say."""
    del about["copies"]


@torch.no_grad()
def test_a_file_of_0_2_0_needs_the_name_of_its_base(base: Any, tmp_path: Path) -> None:
    model = adapted(Around(base), **QV)
    file = tmp_path / "adapter.safetensors"
    ll.save_adapter(model, file)
    rewrite(file, of_0_2_0)
    ll.export_peft(file, tmp_path / "peft", base_name=str(tmp_path / "base"))
    written = config_in(tmp_path / "peft")
    assert written["auto_mapping"] is None
    # it does not say which names end alike
    assert isinstance(written["target_modules"], str)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "peft").eval()
    check_equal(run(found), run(model.model))


def test_a_checkpoint_gives_the_same_folder(tmp_path: Path) -> None:
    model = LitTiny()
    fit = trainer(tmp_path, [lora(merge=False)])
    fit.fit(model, data())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    assert export(tmp_path / "last.ckpt", tmp_path / "of_file") == export(
        model, tmp_path / "of_model"
    )
    assert contents(tmp_path / "of_file") == contents(tmp_path / "of_model")


@pytest.mark.parametrize("is_of_0_2_0", [False, True])
def test_a_sum_of_files_is_as_they_are(
    is_of_0_2_0: bool, base: Any, tmp_path: Path
) -> None:
    files = []
    for target in ("q_proj", "v_proj"):
        model = adapted(Around(base), target_modules=[target])
        file = tmp_path / f"{target}.safetensors"
        ll.save_adapter(model, file)
        files.append(str(file))
    if is_of_0_2_0:
        rewrite(Path(files[1]), of_0_2_0)
    both = str(tmp_path / "both.safetensors")
    assert main(["combine", *files, "--out", both]) == 0
    ll.export_peft(both, tmp_path / "peft")
    written = config_in(tmp_path / "peft")
    assert isinstance(written["target_modules"], str) == is_of_0_2_0
    assert (written["auto_mapping"] is None) == is_of_0_2_0
