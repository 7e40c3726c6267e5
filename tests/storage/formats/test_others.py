"""Files of tools that this package does not read are called what they are, in the console too."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.__main__ import main
from lightning_lora.storage.formats.registry import WRITTEN
from tests.support.models import as_trained

ONE = torch.ones(2, 4)
MODEL = "base_model.model.q_proj"
NAMES: list[tuple[list[str], str]] = [
    (
        ["diffusion_model.qkv.lora_A.weight", "diffusion_model.qkv.lora_B.weight"],
        "kohya's.*diffusers",
    ),
    (
        [
            "lora_unet_to_q.hada_w1_a",
            "lora_unet_to_q.hada_w1_b",
            "lora_unet_to_q.alpha",
        ],
        "another tool.*merged model",
    ),
    (
        [f"{MODEL}.lora_A.default.weight", f"{MODEL}.base_layer.weight"],
        "PEFT, as state.*save_pretrained",
    ),
    (["model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b"], "another tool"),
]


@pytest.mark.parametrize(("names", "match"), NAMES, ids=str)
def test_names_of_tensors_tell_the_tool(
    tmp_path: Path, names: list[str], match: str, capsys: Any
) -> None:
    tensors = {name: ONE.clone() for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(
        {"state_dict": tensors, "pytorch-lightning_version": "2.4.0"},
        tmp_path / "a.ckpt",
    )
    for path in tmp_path.iterdir():
        with pytest.raises(
            ll.AdapterFileError, match=f"adapters of {match}.*train anew here"
        ):
            ll.load_adapter(nn.Linear(4, 4), path)
        assert main(["inspect", str(path)]) != 0
        assert match.partition(".")[0] in capsys.readouterr().err


def test_a_folder_with_files_of_two_formats_is_named(tmp_path: Path) -> None:
    """One of them may be of an older export."""
    model = as_trained(nn.Sequential(nn.Linear(4, 4)))
    ll.export_peft(model, tmp_path)
    save_file(
        {"unet.q.lora_A.weight": ONE}, tmp_path / "pytorch_lora_weights.safetensors"
    )
    other = nn.Sequential(nn.Linear(4, 4))
    message = (
        "also holds 'pytorch_lora_weights.safetensors'. 'adapter_model.safetensors' is "
        "read"
    )
    with pytest.warns(ll.LoRAWarning, match=message):
        ll.load_adapter(other, tmp_path)
    assert torch.equal(other[0].lora_A, model[0].lora_A)


def test_a_repository_is_read_from_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"someone/lora is no file .*snapshot_download\('someone/lora'\)",
    ):
        ll.load_adapter(nn.Sequential(nn.Linear(4, 4)), "someone/lora")
    kept = tmp_path / "models--someone--lora"
    for folder in ("refs", "snapshots"):
        (kept / folder).mkdir(parents=True)
    (kept / "refs" / "main").write_text("1" * 40)
    model = as_trained(nn.Sequential(nn.Linear(4, 4)))
    ll.export_peft(model, kept / "snapshots" / ("1" * 40))
    other = nn.Sequential(nn.Linear(4, 4))
    ll.load_adapter(other, "someone/lora")
    assert torch.equal(other[0].lora_A, model[0].lora_A)
    # a file's name is none of the hub
    with pytest.raises(FileNotFoundError, match=r"someone/lora.ckpt'"):
        ll.load_adapter(nn.Sequential(nn.Linear(4, 4)), "someone/lora.ckpt")


def test_the_type_of_format_names_all_that_are_written() -> None:
    (words,) = [
        get_args(each)
        for name, each in get_type_hints(ll.export_peft).items()
        if name == "format"
    ]
    assert words == tuple(WRITTEN)
