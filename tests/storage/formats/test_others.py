"""Files of tools that this package does not read are called what they are, in the console too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.__main__ import main

DEEP, ONE = "decoder.layers.0.self_attention", torch.ones(2, 4)
NAMES: dict[str, tuple[list[str], str]] = {
    "kohya": (["lora_te_text_q_proj.lora_down.weight", "lora_te_text_q_proj.alpha"], "kohya's sd-scripts.*diffusers"),
    "mlx-lm": (["model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b"], "mlx-lm.*mlx_lm.fuse"),
    "NeMo 1": ([f"model.{DEEP}.adapter_layer.lora_kqv_adapter.linear_in.weight"], "NeMo.*Hugging Face"),
    "NeMo 2": ([f"module.{DEEP}.linear_qkv.adapter.linear_out.weight"], "NeMo.*Hugging Face"),
}


def check_named(path: Path, match: str, capsys: Any) -> None:
    with pytest.raises(ll.AdapterFileError, match=f"adapters of {match}.*train anew here"):
        ll.load_adapter(nn.Linear(4, 4), path)
    assert main(["inspect", str(path)]) != 0
    assert match.partition(".")[0] in capsys.readouterr().err


@pytest.mark.parametrize(("names", "match"), NAMES.values(), ids=NAMES)
def test_names_of_tensors_tell_the_tool(tmp_path: Path, names: list[str], match: str, capsys: Any) -> None:
    tensors = dict.fromkeys(names, ONE)
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.4.0"}, tmp_path / "a.ckpt")
    for path in tmp_path.iterdir():
        check_named(path, match, capsys)


def test_names_of_files_tell_the_tool(tmp_path: Path, capsys: Any) -> None:
    files = {
        "mlx/adapter_config.json": (json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}), "mlx-lm"),
        "nemo/weights/adapter_metadata.json": ("{}", "NeMo"),
        "one.nemo": ("", "NeMo"),
        "lit/lit_model.pth.lora": ("", "litgpt.*merge_lora"),
    }
    for name, (text, match) in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        check_named(tmp_path / name.partition("/")[0], match, capsys)
    check_named(tmp_path / "lit" / "lit_model.pth.lora", "litgpt", capsys)
