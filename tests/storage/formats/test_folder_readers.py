"""`lightning-lora readers FOLDER`: a line for each reader, which agrees with the warnings of the export."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from lightning_lora import LoRAConfig, LoRAWarning, export_peft, save_adapter
from lightning_lora.cli.main import main
from lightning_lora.storage.formats.peft.readers.reader_table import PEFT_READERS
from tests.storage.formats.test_export_models import SCALED, tiny
from tests.support.peft_export import trained

TAKES_IT = "takes it as it is"
NOTE = (
    "vLLM, SGLang, TGI, LoRAX, llama.cpp: only models that they have code for, which is "
    "not looked at."
)


@pytest.fixture
def lines(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command prints of each reader."""
    monkeypatch.setenv("COLUMNS", "240")

    def lines_of(folder: Path) -> dict[str, str]:
        assert main(["readers", str(folder)]) == 0, capsys.readouterr().err
        found = dict[str, str]()
        *of_readers, note = capsys.readouterr().out.splitlines()
        assert note == NOTE
        for line in of_readers:
            reader, _, text = line.partition(": ")
            found[reader] = text
        return found

    return lines_of


def exported(
    folder: Path, kind: str = "Llama", uniform: bool = False, **config: Any
) -> str:
    """A folder of a tiny language model. Returns what the export warned of."""
    usual = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    base = tiny(kind, "ForCausalLM")
    model = trained(base, LoRAConfig(**usual | config))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        export_peft(model, folder, uniform=uniform)
    ours = [each for each in said if each.category is LoRAWarning]
    return " ".join(str(each.message) for each in ours)


def test_a_plain_folder_is_taken_by_all(lines: Any, tmp_path: Path) -> None:
    exported(tmp_path)
    found = lines(tmp_path)
    assert list(found) == [reader.name for reader in PEFT_READERS]
    assert set(found.values()) == {TAKES_IT}


@pytest.mark.parametrize(("config", "says"), SCALED)
@pytest.mark.parametrize("uniform", [False, True])
def test_scalings_are_those_that_the_export_warns_of(
    lines: Any, config: Any, says: str, uniform: bool, tmp_path: Path
) -> None:
    warned = exported(tmp_path, uniform=uniform, **config)
    for reader, text in lines(tmp_path).items():
        is_warned = reader in warned
        assert ("scales otherwise" in text) == is_warned, reader
        assert (text == TAKES_IT) != is_warned, text


def test_what_trains_whole_is_named(lines: Any, tmp_path: Path) -> None:
    exported(tmp_path, modules_to_save=["norm", "lm_head"])
    found = lines(tmp_path)
    assert found["PEFT"] == found["transformers"] == TAKES_IT
    assert (
        found["SGLang"] == "ignores whole heads ('lm_head'), whole norms ('model.norm')"
    )
    assert (
        found["llama.cpp"]
        == "refuses whole heads ('lm_head'); ignores whole norms ('model.norm')"
    )


def test_each_other_kind_is_named(lines: Any, tmp_path: Path) -> None:
    exported(tmp_path / "dora", use_dora=True, kind="Qwen2", bias="lora_only")
    found = lines(tmp_path / "dora")
    assert found["vLLM"].startswith("refuses DoRA, biases")
    assert found["TGI"] == "ignores DoRA, biases"
    exported(tmp_path / "embedding", target_modules=["embed_tokens"])
    assert (
        lines(tmp_path / "embedding")["LoRAX"]
        == "ignores adapted embeddings ('model.embed_tokens')"
    )
    exported(tmp_path / "experts", kind="Mixtral", target_parameters=["down_proj"])
    found = lines(tmp_path / "experts")
    assert found["PEFT"] == TAKES_IT
    assert (
        found["llama.cpp"]
        == "not known: experts ('model.layers.0.mlp.experts', 'model.layers.1.mlp.experts')"
    )


ALPHA_OF_ONE = {"alpha_pattern": {"0.mlp.experts.down_proj": 7}}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"use_dora": True}),
    ("Llama", {"trainable_token_indices": {"embed_tokens": [1, 2]}}),
    ("Llama", {"target_modules": ["embed_tokens"]}),
    ("Llama", {"modules_to_save": ["norm"]}),
    ("Qwen2", {"bias": "lora_only"}),
    ("Mixtral", {"target_parameters": ["down_proj"]}),
    ("Mixtral", {"target_parameters": ["down_proj"], **ALPHA_OF_ONE}),
]


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_an_export_names_every_reader_that_computes_something_else_without_a_word(
    lines: Any, kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    warned = exported(tmp_path, kind, **config)
    found = lines(tmp_path)
    assert "ignores" in found["TGI"] or "scales otherwise" in found["TGI"]
    for reader, text in found.items():
        if "ignores" in text or "scales otherwise" in text:
            assert reader in warned


def test_trained_rows_are_named(lines: Any, tmp_path: Path) -> None:
    exported(tmp_path, trainable_token_indices={"embed_tokens": [1, 2]})
    found = lines(tmp_path)
    assert found["PEFT"] == TAKES_IT
    assert (
        found["vLLM"]
        == found["llama.cpp"]
        == "refuses trained rows ('model.embed_tokens')"
    )


def test_another_alpha_of_single_experts_is_named(lines: Any, tmp_path: Path) -> None:
    exported(tmp_path, "Mixtral", target_parameters=["down_proj"], **ALPHA_OF_ONE)
    found = lines(tmp_path)
    for reader in ("vLLM", "SGLang", "TGI", "LoRAX", "llama.cpp"):
        assert found[reader].startswith("scales otherwise: alphas of single layers"), (
            reader
        )


# which peft asks for
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_folder_that_peft_wrote_is_read(lines: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 4},
        modules_to_save=["norm"],
    )
    peft.get_peft_model(tiny("Llama", "ForCausalLM"), config).save_pretrained(tmp_path)
    found = lines(tmp_path)
    assert found["transformers"] == TAKES_IT
    norm = "model.layers.0.input_layernorm"
    assert found["vLLM"].startswith(
        f"scales otherwise: ranks of single layers; refuses whole norms ({norm!r}"
    )
    assert found["llama.cpp"].startswith(f"ignores whole norms ({norm!r}")


def test_a_head_with_a_bias_is_no_norm(lines: Any, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict(
        {"layer": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)}
    )
    export_peft(
        trained(
            model, LoRAConfig(r=2, target_modules=["layer"], modules_to_save=["head"])
        ),
        tmp_path,
    )
    assert lines(tmp_path)["SGLang"] == "ignores whole heads ('head')"


ADVICE = (
    "holds no adapters in PEFT's format. Pass a folder that PEFT reads. From a file of "
    "this package"
)


def test_a_folder_or_a_file_without_adapters_of_pefts_is_told_how_to_get_one(
    capsys: Any, tmp_path: Path
) -> None:
    def says(path: Path) -> str:
        assert main(["readers", str(path)]) == 1
        return " ".join(capsys.readouterr().err.split())

    save_adapter(
        trained(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2)),
        tmp_path / "a.safetensors",
    )
    assert f"{tmp_path} {ADVICE}" in says(tmp_path)
    assert f"{tmp_path / 'a.safetensors'} {ADVICE}" in says(tmp_path / "a.safetensors")


def test_the_advice_on_what_is_no_folder_is_for_this_command(
    capsys: Any, tmp_path: Path
) -> None:
    text = tmp_path / "README.md"
    text.write_text("# Adapters")
    assert main(["readers", str(text)]) == 1
    assert f"{text} {ADVICE}" in " ".join(capsys.readouterr().err.split())
    assert main(["readers", "someone/adapters"]) == 1
    said = capsys.readouterr().err
    assert "snapshot_download('someone/adapters')" in said
    assert "load_adapter" not in said


def test_what_is_no_folder_of_pefts_is_an_error(capsys: Any, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert main(["readers", str(tmp_path)]) == 1
    assert "holds no adapters in PEFT's format" in " ".join(
        capsys.readouterr().err.split()
    )
