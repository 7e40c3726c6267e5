"""The console command, as its users call it."""

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from tests.support.compared import assert_same_tensors
from tests.support.faults import adapted
from tests.support.messages import assert_in_text
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.storage import rewrite, saved


@pytest.fixture
def file(tmp_path: Path) -> str:
    ll.save_adapter(adapted(), tmp_path / "a.safetensors")
    return str(tmp_path / "a.safetensors")


def says(capsys: Any) -> str:
    """What a command wrote of its errors, on one line."""
    return " ".join(capsys.readouterr().err.split())


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(tensors.items()))


def update_of(layer: Any) -> Tensor:
    """s B A."""
    return layer.lora_settings.scaling * layer.lora_B @ layer.lora_A


SHOWN = [
    "q_proj",
    "v_proj",
    "Linear",
    "head.weight [4, 8]",
    "4 frozen tensors",
    "modules_to_save=['head']",
]


def test_inspect_shows_what_a_file_holds_as_tables(file: str, capsys: Any) -> None:
    assert main(["inspect", file]) == 0
    assert_in_text(SHOWN, capsys.readouterr().out)


def test_inspect_shows_what_a_file_holds_as_json(file: str, capsys: Any) -> None:
    assert main(["inspect", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    delta = update_of(adapted().q_proj)
    q, v = found["layers"]
    assert q["name"] == "q_proj"
    assert v["name"] == "v_proj"
    assert q["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
    assert 1 <= q["effective_rank"] <= 2
    assert q["scaling"] == 4
    assert found["beside"].keys() == {"head.weight", "head.bias"}
    assert found["format"] == 3


def test_merge_writes_a_model_and_a_line_for_each_warning(
    file: str, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base.safetensors"
    out = tmp_path / "merged.safetensors"
    save_file(LitTiny().state_dict(), base)
    assert main(["merge", str(base), file, str(out)]) == 0
    assert "Merged 2 weights into" in capsys.readouterr().out
    model = adapted()
    ll.merge_adapters(model)
    assert_same_tensors(in_order(load_file(out)), in_order(model.state_dict()))
    save_file(LitTiny().bfloat16().state_dict(), base)
    assert main(["merge", str(base), file, str(out)]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: 4 tensors in")
    assert main(["merge", str(base), file, str(tmp_path / "merged.bin")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: 4 tensors in")
    assert lines[-1].startswith("error: ")


def test_merge_names_what_the_adapters_file_holds_whole(
    file: str, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base.safetensors"
    save_file(LitTiny().state_dict(), base)
    assert main(["merge", str(base), file, str(tmp_path / "merged.safetensors")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"It also has 2 tensors as {file} holds them, whole: 'head." in said
    saved(Path(file), LitTiny())
    assert main(["merge", str(base), file, str(tmp_path / "merged.safetensors")]) == 0
    assert "whole" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"), [("none", "does not exist."), ("text", "is no archive of torch")]
)
def test_an_error_is_the_last_line_below_the_usage_and_a_code(
    tmp_path: Path, capsys: Any, name: str, says: str
) -> None:
    (tmp_path / "text").write_text("no file of tensors")
    assert main(["inspect", str(tmp_path / name)]) == 1
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: lightning-lora inspect [-h] [--json] file")
    assert error.startswith("error: ")
    assert says in error


def test_a_module_and_a_pipe(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as head does when it has seen enough
    monkeypatch.setattr(sys, "argv", ["lightning-lora", "inspect", file, "--json"])
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as done:
            runpy.run_path(
                str(Path(ll.__file__).with_name("__main__.py")), run_name="__main__"
            )
    assert not done.value.code


def test_an_unknown_command_is_an_error_of_usage() -> None:
    with pytest.raises(SystemExit) as done:
        main(["nothing"])
    assert done.value.code == 2


def test_combine_writes_a_file_that_loads(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "one.safetensors"
    one = saved(path, LitTiny(), target_modules=["q_proj"])
    out = str(tmp_path / "sum.safetensors")
    assert (
        main(["combine", str(path), str(path), "--weights", "1", "-3", "--out", out])
        == 0
    )
    assert "Combined 2 files, 1 layer, into" in capsys.readouterr().out
    both = LitTiny()
    ll.load_adapter(both, out)
    torch.testing.assert_close(update_of(both.q_proj), -2 * update_of(one.q_proj))


def test_export_writes_what_peft_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    model = saved(tmp_path / "a.safetensors", LitTiny(), rank_pattern={"v_proj": 1})
    folder = tmp_path / "peft"
    index = torch.arange(4)
    arguments = ["export", str(tmp_path / "a.safetensors"), str(folder)]
    assert main([*arguments, "--uniform"]) == 0
    assert "Wrote files for peft into" in capsys.readouterr().out
    assert '"rank_pattern": {}' in (folder / "adapter_config.json").read_text()
    there = peft.PeftModel.from_pretrained(LitTiny(), folder)
    torch.testing.assert_close(there(index), model(index), rtol=1e-5, atol=1e-6)
    assert main([*arguments, "--root", "none"]) == 1


def test_export_names_a_base_that_is_a_folder_of_this_machine(
    tmp_path: Path, capsys: Any
) -> None:
    base = LitTiny()
    # as models of transformers have one
    base.config = SimpleNamespace(_name_or_path=str(tmp_path))
    saved(tmp_path / "a.safetensors", base)
    arguments = ["export", str(tmp_path / "a.safetensors"), str(tmp_path / "peft")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"They name the base {str(tmp_path)!r}, a folder of this machine." in said
    assert "--base-name" in said
    assert main([*arguments, "--base-name", "me/tiny"]) == 0
    assert "the base" not in capsys.readouterr().out
    assert main([*arguments, "--base-name", ""]) == 0
    assert "the base" not in capsys.readouterr().out


def block() -> nn.Module:
    return nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})


def test_layers_of_several_blocks_are_one_row_if_their_rank_is_the_same(
    tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "a.safetensors"
    model = nn.ModuleList([block(), block(), block(), block()])
    saved(path, model, r=4, alpha=None, rank_pattern={r"1\.query": 2})
    assert main(["inspect", str(path)]) == 0
    rows = ["0,2-3.query (×3)", "1.query ", "*.value (×4)", "alpha=None"]
    assert_in_text(rows, capsys.readouterr().out)


def test_inspect_shows_how_many_rows_of_an_embedding_train(
    tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "a.safetensors"
    saved(path, LitTiny(), trainable_token_indices={"embed": [1, 3]})
    assert main(["inspect", str(path)]) == 0
    assert "Rows of embed train: 2." in capsys.readouterr().out


def test_inspect_shows_what_the_run_knew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = LitTiny()
    # as models of transformers have one
    base.config = SimpleNamespace(_name_or_path="me/tiny")
    fit = trainer(tmp_path, [lora(merge=False)])
    fit.fit(base, data(), data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loss = float(fit.callback_metrics["val_loss"])
    assert main(["inspect", str(tmp_path / "a.ckpt")]) == 0
    assert_in_text(
        ["They came from 'me/tiny'.", f"Logged last: val_loss {loss:.4g}"],
        capsys.readouterr().out,
    )
    assert main(["inspect", str(tmp_path / "a.ckpt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"val_loss": loss}


def test_files_may_be_named_by_urls(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(Path(file), LitTiny())
    save_file(LitTiny().state_dict(), tmp_path / "base.safetensors")
    (tmp_path / "out").mkdir()
    url = f"file://{file}"
    here = f"file://{tmp_path}/out"
    elsewhere = f"memory://{uuid4()}"
    assert main(["inspect", url]) == 0
    assert main(["export", url, f"{here}/peft"]) == 0
    assert (
        main(
            [
                "merge",
                f"file://{tmp_path}/base.safetensors",
                url,
                f"{here}/m.safetensors",
            ]
        )
        == 0
    )
    assert main(["combine", url, url, "--out", f"{here}/c.safetensors"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "peft",
        "m.safetensors",
        "c.safetensors",
    }
    assert main(["combine", url, url, "--out", f"{elsewhere}/c.safetensors"]) == 0
    assert main(["inspect", f"{elsewhere}/c.safetensors"]) == 0
    capsys.readouterr()
    assert main(["merge", f"{elsewhere}/base", file, "out"]) == 1
    assert "is elsewhere" in capsys.readouterr().err


BROKEN: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "adapted by your own class LoRAMine": lambda about, _: about["layers"][0].update(
        kind="LoRAMine"
    ),
    "'q_proj.lora_B' in ": lambda _, tensors: tensors["q_proj.lora_B"].fill_(torch.nan),
}


@pytest.mark.parametrize("command", ["inspect", "combine", "merge"])
@pytest.mark.parametrize(("message", "change"), BROKEN.items(), ids=BROKEN)
def test_what_no_command_can_use_is_refused(
    file: str, tmp_path: Path, capsys: Any, message: str, change: Any, command: str
) -> None:
    rewrite(Path(file), change)
    base = str(tmp_path / "base.safetensors")
    out = str(tmp_path / "out.safetensors")
    save_file(LitTiny().state_dict(), base)
    arguments = {
        "inspect": [file],
        "combine": [file, file, "--out", out],
        "merge": [base, file, out],
    }
    assert main([command, *arguments[command]]) == 1
    assert message in says(capsys)
    assert not Path(out).exists()


def test_commands_say_what_a_folder_of_peft_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "peft"
    ll.export_peft(adapted(), folder)
    advice = ["holds adapters of PEFT", "save_adapter(model, 'adapter.safetensors')"]
    assert main(["inspect", str(folder)]) == 1
    assert_in_text(advice, says(capsys))
    assert main(["export", f"{folder}/adapter_model.safetensors", f"{folder}/out"]) == 1
    assert_in_text(advice, says(capsys))


ESCAPES = "\x1b[31mred\x1b]0;title\x07\u202e\nline"


def shows_as_text(command: list[str], capsys: Any) -> None:
    """Expect a command to print these characters so that no terminal obeys them."""
    main(command)
    shown = "".join(capsys.readouterr())
    assert shown.replace("\n", "").isprintable()
    assert r"\x1b[31mred\x1b]0" in re.sub(r"[\s│┃]", "", shown)


def test_names_in_files_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    of_a_layer = saved(file, nn.ModuleDict({ESCAPES: nn.Linear(4, 4)}), bias="all")
    shows_as_text(["inspect", str(file)], capsys)
    assert r"\x1b[31mred" in str(ll.summarize(of_a_layer))
    assert "\x1b" not in str(ll.summarize(of_a_layer))
    of_rows = nn.ModuleDict({ESCAPES: nn.Embedding(4, 4), "a": nn.Linear(4, 4)})
    saved(file, of_rows, target_modules=["a"], trainable_token_indices={ESCAPES: [1]})
    shows_as_text(["inspect", str(file)], capsys)


def test_names_of_files_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "a.safetensors")
    odd = str(tmp_path / ESCAPES)
    base = str(tmp_path / "base.safetensors")
    saved(Path(file), LitTiny())
    save_file(LitTiny().state_dict(), base)
    for command in (
        ["inspect", odd],
        ["merge", odd, file, "out.ckpt"],
        ["merge", base, file, f"{odd}.safetensors"],
    ):
        shows_as_text(command, capsys)
    shows_as_text(["combine", file, file, "--out", f"{odd}.safetensors"], capsys)
    shows_as_text(["inspect", f"{odd}.safetensors"], capsys)
    shows_as_text(["export", file, odd], capsys)


@pytest.mark.parametrize("command", ["inspect", "merge", "export", "combine"])
def test_help_is_what_the_command_says_of_itself(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    written = import_module(f"lightning_lora.cli.{command}").__doc__ or ""
    assert done.value.code == 0
    assert written.replace("::\n", ":\n").strip() in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"lightning-lora {ll.__version__}\n"


def test_an_error_without_words_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str) -> None:
        raise OSError

    monkeypatch.setattr("lightning_lora.cli.inspect.read_without_model", fails)
    assert main(["inspect", "adapter.safetensors"]) == 1
