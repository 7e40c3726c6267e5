"""The console command, as its users call it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, export_peft, inject_adapters, load_adapter, merge_adapters, save_adapter
from lightning_lora.cli.main import main
from tests.support.models import LitTiny, randomise

CONFIG = LoRAConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["head"])


def adapted(seed: int, config: LoRAConfig = CONFIG) -> LitTiny:
    model = LitTiny()
    inject_adapters(model, config)
    randomise(model, seed)
    return model


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2, 3)]
    for seed, path in enumerate(paths):
        save_adapter(adapted(seed), path)
    return [str(path) for path in paths]


def test_inspect_shows_layers_and_what_is_beside(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", files[0]]) == 0
    shown = capsys.readouterr().out
    for text in ("q_proj", "v_proj", "Linear", "head.weight [4, 8]", "4 frozen tensors", '"modules_to_save"'):
        assert text in shown


def test_inspect_gives_every_layer_as_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", files[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = adapted(0)
    delta: Any = 2 * model.q_proj.lora_B @ model.q_proj.lora_A  # type: ignore[operator]
    assert [layer["name"] for layer in found["layers"]] == ["q_proj", "v_proj"]
    assert found["layers"][0]["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
    assert 1 <= found["layers"][0]["effective_rank"] <= 2 and found["layers"][0]["scaling"] == 2
    assert found["beside"].keys() == {"head.weight", "head.bias"} and found["format"] == 3


def test_compare_gives_each_pair(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files, files[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 6
    same = next(pair for pair in found if pair["files"] == [files[0], files[0]])
    for layer in same["layers"]:
        assert [layer[key] for key in ("cosine", "similarity_A", "similarity_B")] == pytest.approx([1, 1, 1])
    assert abs(found[0]["layers"][0]["cosine"]) < 0.9
    assert main(["compare", *files[:2]]) == 0
    assert "q_proj" in capsys.readouterr().out


def test_compare_draws_a_picture(files: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["compare", *files[:2], "--picture", str(tmp_path / "cosines.png")]) == 0
    assert (tmp_path / "cosines.png").read_bytes().startswith(b"\x89PNG")


def test_compare_needs_layers_in_common(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.safetensors"
    save_adapter(adapted(0, LoRAConfig(r=2, target_modules=["embed"])), other)
    assert main(["compare", files[0], str(other)]) == 1
    assert "no layer in common, such as 'q_proj' and 'embed'" in " ".join(capsys.readouterr().err.split())
    assert main(["compare", files[0]]) == 1


def test_merge_writes_the_merged_model(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(LitTiny().state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(tmp_path / "base.safetensors"), files[0], str(out)]) == 0
    assert "Merged 2 weights into" in capsys.readouterr().out
    model = adapted(0)
    merge_adapters(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_file(out).items())


@pytest.mark.parametrize("command", ["inspect", "merge", "export", "compare", "combine"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and f"\n  lightning-lora {command} " in capsys.readouterr().out


def test_errors_are_one_line_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path, "is not a file")):
        assert main(["inspect", str(path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and "Traceback" not in error
    for wrong in (["inspect"], ["nothing"], []):
        with pytest.raises(SystemExit) as done:
            main(wrong)
        assert done.value.code == 2


def test_warnings_are_one_line_each(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({name: value.bfloat16() for name, value in LitTiny().state_dict().items()}, tmp_path / "base.safetensors")
    assert main(["merge", str(tmp_path / "base.safetensors"), files[0], str(tmp_path / "merged.safetensors")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: 4 tensors in")


def test_a_module_and_a_pipe(files: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = f"{sys.executable} -m lightning_lora inspect {files[0]} --json | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_combine_writes_a_file_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LoRAConfig(r=2, target_modules=["q_proj"])
    for seed in (0, 1):
        save_adapter(adapted(seed, config), tmp_path / f"{seed}.safetensors")
    both = [str(tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    assert main(["combine", *both, "--weights", "1", "2", "--out", str(tmp_path / "sum.safetensors")]) == 0
    assert "Combined 2 files, 1 layer, into" in capsys.readouterr().out
    model, parts = LitTiny(), [adapted(seed, config).q_proj for seed in (0, 1)]
    load_adapter(model, tmp_path / "sum.safetensors")
    expected: Any = sum(w * part.lora_B @ part.lora_A for w, part in zip((1, 2), parts, strict=True))  # type: ignore[operator]
    torch.testing.assert_close(model.q_proj.lora_B @ model.q_proj.lora_A, expected)  # type: ignore[operator]
    assert main(["combine", both[0], "--out", str(tmp_path / "one.safetensors")]) == 1


def test_export_writes_what_peft_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(0, LoRAConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 1}))
    save_adapter(model, tmp_path / "a.safetensors")
    for more in ([], ["--uniform"]):
        assert main(["export", str(tmp_path / "a.safetensors"), str(tmp_path / "peft"), *more]) == 0
        assert "Wrote PEFT's files into" in capsys.readouterr().out
        there = peft.PeftModel.from_pretrained(LitTiny(), tmp_path / "peft")
        torch.testing.assert_close(there(torch.arange(4)), model(torch.arange(4)), rtol=1e-5, atol=1e-6)
    assert main(["export", str(tmp_path / "a.safetensors"), str(tmp_path / "peft"), "--root", "none"]) == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention_of_this_block = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})


@pytest.mark.parametrize("width", [60, 80])
def test_rows_hold_whole_names_and_groups_differ_by_rank(
    tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(4))})})
    inject_adapters(model, LoRAConfig(r=4, rank_pattern={r".*blocks\.1\..*query": 2}))
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    for seed, path in enumerate(paths):
        randomise(model, seed)
        save_adapter(model, path)
    inside = "self_attention_of_this_block."
    groups = [f"0,2-3.{inside}query(×3)", f"1.{inside}query", f"*.{inside}value(×4)"]
    every = [f"{i}.{inside}{name}" for i in range(4) for name in ("query", "value")]
    for arguments, expected in ((["inspect", paths[0]], groups), (["compare", *paths], every)):
        assert main(arguments) == 0
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃", "├"))]
        assert all(len(line) <= width for line in table)
        names = "".join(line.split("│")[1] for line in table if line.startswith("│")).replace(" ", "")
        assert sorted(names.split("encoder.blocks.")[1:]) == sorted(expected)


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    """A folder as PEFT writes it, with the file of its base beside it."""
    model = adapted(1)
    export_peft(model, tmp_path / "peft")
    save_file(LitTiny().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "peft"


def test_commands_say_what_a_folder_of_peft_needs(peft_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(peft_folder)
    for path in (folder, f"{folder}/adapter_model.safetensors"):
        for arguments in (["inspect", path], ["compare", path, path], ["export", path, f"{folder}/out"]):
            assert main(arguments) == 1
            says = " ".join(capsys.readouterr().err.split())
            assert f"{path} holds adapters of PEFT" in says and "save_adapter(model, 'adapter.safetensors')" in says
