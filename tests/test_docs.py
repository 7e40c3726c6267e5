"""The pages show code that runs, and the site has them all."""

import ast
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

import lightning_lora
from lightning_lora import LoRACallback, LoRAConfig, inject_adapters, save_adapter
from lightning_lora.cli.main import main
from tests.support.models import randomise
from tests.support.ranks import has_shards

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
NAMES = f"""
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_lora import {", ".join(lightning_lora.__all__)}
"""
QUIET = "accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, "


def blocks(page: str, language: str = "python") -> list[str]:
    return blocks_in(PAGES[page], language)


def blocks_in(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines that one types. A line that ends in a backslash goes on in the next one."""
    return "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()


def sections(page: str) -> dict[str, list[str]]:
    """The code below each heading that has some."""
    _, *parts = re.split(r"^## (.*)\n", PAGES[page], flags=re.MULTILINE)
    code = {heading: blocks_in(text) for heading, text in zip(parts[::2], parts[1::2], strict=True)}
    return {heading: found for heading, found in code.items() if found}


MODULE = blocks("first-steps")[0]
STARTED = ("command-line", "launchers", "sharded")
"""Pages with a program that is started in another way."""
BY_HAND = ("frameworks",)
"""Pages with code for packages that are no dependencies. It was run by hand, and the page says when."""


BEFORE = {
    "sharing": """
trainer = L.Trainer(callbacks=[LoRACallback(r=2, target_modules=["linear1"], merge=False)], max_steps=1)
trainer.fit(model)
trainer.save_checkpoint("best.ckpt")
""",
    "moving": """
import loralib as lora
from pathlib import Path
from torch import nn
trained = MyModule()
inject_adapters(trained, LoRAConfig(r=4, alpha=16, target_modules=["linear1"]))
Path("runs").mkdir()
export_peft(trained, "runs/adapter")
gpt2 = nn.ModuleDict({"c_attn": nn.Linear(16, 48)})
theirs = nn.ModuleDict({"c_attn": lora.MergedLinear(16, 48, r=4, enable_lora=[True, False, True])})
torch.save(lora.lora_state_dict(theirs), "gpt2.bin")
""",
}
"""What a page takes as given."""


def program(folder: Path, page: str) -> Path:
    """The code of a page, with the module of the first steps and quiet Trainers."""
    if page == "first-steps":
        return written(folder, blocks(page)[1:])
    return written(folder, [NAMES, "model = MyModule()\n", BEFORE.get(page, ""), *blocks(page)])


def written(folder: Path, code: list[str]) -> Path:
    path = folder / "main.py"
    path.write_text(MODULE + "".join(code).replace("L.Trainer(", f"L.Trainer({QUIET}"))
    return path


def module() -> Any:
    """An object of the class of the first steps."""
    known: dict[str, Any] = {"__name__": "pages"}
    exec(MODULE, known)
    return known["MyModule"]()


def calls_in(code: str) -> list[str]:
    return re.findall(r"LoRACallback\((?:[^()]|\([^()]*\))+\)", code)


def config_of(call: str) -> LoRAConfig:
    callback: LoRACallback = eval(call, {"LoRACallback": LoRACallback})
    return callback.config


@pytest.mark.filterwarnings("ignore:The names in the file:lightning_lora.LoRAWarning")
@pytest.mark.filterwarnings("ignore:.*are layers of nn.TransformerEncoder:lightning_lora.LoRAWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in (*STARTED, *BY_HAND)])
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(program(tmp_path, page)))


@pytest.mark.slow
@pytest.mark.parametrize("section", sections("launchers"))
def test_code_of_a_launcher_runs_in_two_processes(section: str, tmp_path: Path) -> None:
    if section == "Ray Train":
        pytest.importorskip("ray.train.lightning")
    said = started(written(tmp_path, [NAMES, *sections("launchers")[section]]))
    assert section == "Ray Train" or "MEMBER: 2/2" in said  # which Lightning does not say of Ray's processes


@pytest.mark.slow
@pytest.mark.skipif(not has_shards, reason="models are sharded with torch 2.7 and later")
def test_code_of_a_sharded_model_runs_in_two_processes(tmp_path: Path) -> None:
    assert "MEMBER: 2/2" in started(program(tmp_path, "sharded"))
    assert (tmp_path / "adapter.safetensors").exists()


def started(path: Path) -> str:
    """Run a program in a process of its own, and return what it says beside its output."""
    folder = path.parent
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run([sys.executable, path], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, about LightningCLI
def test_program_with_a_command_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for line in commands("command-line") if line.startswith("python")]
    quiet = ["accelerator=cpu", "logger=false", "enable_progress_bar=false", "enable_model_summary=false"]
    flags = [*(f"--trainer.{each}" for each in quiet), "--seed_everything=0"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*shlex.split(line)[1:], *flags])
    runpy.run_path(str(program(tmp_path, "command-line")), run_name="__main__")
    assert yaml.safe_load(Path("config.yaml").read_text())["lora"]["r"] == 2


def test_settings_of_the_command_line_are_the_callbacks() -> None:
    own, listed = [yaml.safe_load(text) for text in blocks("command-line", "yaml")]
    assert LoRACallback(**own["lora"]).merge == "last"
    (entry,) = listed["trainer"]["callbacks"]
    assert entry["class_path"] == "lightning_lora.LoRACallback" and LoRACallback(**entry["init_args"])


def test_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(module().state_dict(), "base.safetensors")
    for seed, name in enumerate(("adapter", "seed1", "seed2")):
        model = module()
        inject_adapters(model, LoRAConfig(r=2, target_modules=["linear1"]))
        randomise(model, seed)
        save_adapter(model, f"{name}.safetensors")
    lines = [line for line in commands("command-line") if line.startswith("lightning-lora")]
    assert len(lines) == 7
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert {path.stem for path in tmp_path.iterdir()} >= {"merged", "both", "small", "peft_folder"}


def test_every_callback_of_the_pages_finds_its_layers() -> None:
    calls = calls_in("".join(text for page in PAGES if page not in BY_HAND for text in blocks(page)))
    assert len(calls) >= 15
    for call in calls:
        assert inject_adapters(module(), config_of(call)), call


@pytest.mark.parametrize("page", BY_HAND)
def test_code_that_was_run_by_hand_is_python_and_its_callbacks_can_be_made(page: str) -> None:
    code = "".join(blocks(page))
    ast.parse(code)
    assert len(calls_in(code)) >= 5 and all(config_of(call) for call in calls_in(code))


def test_the_last_eight_blocks_are_eight() -> None:
    (call,) = [line for line in blocks("targets") if r"encoder\." in line]
    names = inject_adapters(module(), config_of(call))
    assert {int(name.split(".")[2]) for name in names} == set(range(4, 12)) and len(names) == 24


def test_reference_has_every_public_name_once() -> None:
    shown = re.findall(r"^::: lightning_lora\.(\w+)$", PAGES["reference"], re.MULTILINE)
    assert sorted(shown) == sorted(lightning_lora.__all__)


def docstrings() -> Iterator[str]:
    """Those of the public names, and of their own methods."""
    for name in lightning_lora.__all__:
        one = getattr(lightning_lora, name)
        for each in (one, *(getattr(value, "__func__", value) for value in vars(one).values())):
            yield (inspect.getdoc(each) or "") if callable(each) else ""


def test_public_docstrings_are_markdown() -> None:
    assert [text for text in docstrings() if re.search(r":\w+:`", text)] == []


COLUMN = 80
"""The number of characters that the site shows of a line of code, in a window of 1440 pixels."""


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_fits_its_column(page: str) -> None:
    code = re.findall(r"^```\w+\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    assert [line for text in code for line in text.splitlines() if len(line) > COLUMN] == []


def test_examples_of_the_reference_fit_their_column() -> None:
    lines = [line for text in docstrings() for line in text.partition("Example:\n")[2].splitlines()]
    assert len(lines) > 100 and [line for line in lines if len(line) > COLUMN + len("    ")] == []


def leaves(tree: Any) -> Iterator[str]:
    for entry in tree:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else leaves(value)


def test_every_page_is_in_the_site() -> None:
    settings = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())
    assert sorted(leaves(settings["nav"])) == sorted(f"{page}.md" for page in PAGES)


def test_the_first_page_leads_to_every_page() -> None:
    assert {*re.findall(r"\]\(([\w-]+)\.md\)", PAGES["index"])} == PAGES.keys() - {"index"}


def test_the_search_of_the_site_needs_no_network_and_no_server() -> None:
    settings = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())
    assert "offline" in settings["plugins"]  # it puts the index into a script: pages in a folder may read no other file
    (worker,) = settings["extra"]["polyfills"]
    assert "iframe-worker" in worker and (ROOT / "docs" / worker).exists()  # by this name, the plugin knows it
