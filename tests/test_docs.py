"""README and pages show code that runs, and links that lead somewhere; the site has all pages."""

import ast
import builtins
import inspect
import os
import pkgutil
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import lightning_lora
from examples.my_module import MyModule
from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from lightning_lora.cli.main import main
from lightning_lora.model.untrained.find_untrained import Untrained, find_untrained
from lightning_lora.model.view import View
from tests.support.models import same, state
from tests.support.ranks import has_shards, run_ranks

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text()
QUIET = (
    "accelerator='cpu', logger=False, enable_progress_bar=False, "
    "enable_model_summary=False, "
)


def blocks(page: str, language: str = "python") -> list[str]:
    return blocks_in(PAGES[page], language)


def blocks_in(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands_of(program: str) -> list[str]:
    """The lines of the page on the command line that call a program.

    A backslash joins a line and the next one.
    """
    lines = "".join(blocks("command-line", "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(program)]


def sections(page: str) -> dict[str, list[str]]:
    """The code below each heading that has some."""
    _, *parts = re.split(r"^## (.*)\n", PAGES[page], flags=re.MULTILINE)
    code = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        blocks_below = blocks_in(text)
        if blocks_below:
            code[heading] = blocks_below
    return code


BLOCKS = blocks_in(README)
WITH_CODE = {page for page in PAGES if blocks(page)}
STARTED = ("command-line", "strategies", "privacy", "sharded")
"""Pages with a program that is started in another way, or in another file of tests."""
BY_HAND = ("frameworks",)
"""Pages with code for packages that are no dependencies.

It was run by hand, and the page says when.
"""


def program(folder: Path, page: str) -> Path:
    """The code of a page alone, with quiet Trainers."""
    return written(folder, blocks(page))


def written(folder: Path, code: list[str]) -> Path:
    path = folder / "main.py"
    path.write_text(quiet("".join(code)))
    return path


def quiet(code: str) -> str:
    """Code with quiet Trainers. One with a logger in the same line keeps it."""
    code = code.replace("L.Trainer(", f"L.Trainer({QUIET}")
    return re.sub(r"logger=False, (?=.*\blogger=)", "", code)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:The names in the file:lightning_lora.LoRAWarning")
@pytest.mark.filterwarnings(
    "ignore:.*are layers of nn.TransformerEncoder:lightning_lora.LoRAWarning"
)
@pytest.mark.parametrize("page", sorted(WITH_CODE.difference(STARTED, BY_HAND)))
def test_code_of_a_page_runs(page: str, here: Path) -> None:
    if page == "targets":
        pytest.importorskip("torchao")
    runpy.run_path(str(program(here, page)))


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "section", [each for each in sections("strategies") if each != "DDP"]
)
def test_code_that_starts_processes_runs(section: str, here: Path) -> None:
    if section == "Ray Train":
        pytest.importorskip("ray.train.lightning")
    runpy.run_path(
        str(written(here, [blocks("strategies")[0], *sections("strategies")[section]]))
    )


def run(path: Path) -> int:
    """Run a program in a process that looks as if torchrun had started it, and return their number."""
    os.chdir(path.parent)
    warnings.simplefilter("ignore")
    runpy.run_path(str(path), run_name="__main__")
    return dist.get_world_size()


@pytest.mark.processes
def test_code_of_ddp_runs_in_two_processes(tmp_path: Path) -> None:
    assert run_ranks(
        run,
        written(tmp_path, [blocks("strategies")[0], *sections("strategies")["DDP"]]),
    ) == [2, 2]


@pytest.mark.processes
@pytest.mark.skipif(
    not has_shards, reason="models are sharded with torch 2.7 and later"
)
def test_code_of_a_sharded_model_runs_in_two_processes(tmp_path: Path) -> None:
    assert run_ranks(run, program(tmp_path, "sharded")) == [2, 2]
    assert (tmp_path / "adapter.safetensors").exists()


# jsonargparse's, about LightningCLI
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_program_with_a_command_line_fits_resumes_and_tests(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = commands_of("python")
    assert [shlex.split(line)[2] for line in lines] == ["fit", "fit", "test"]
    flags = [
        "--trainer.accelerator=cpu",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--seed_everything=0",
    ]
    *program_of_the_page, _ = blocks("command-line")
    main_py = written(here, program_of_the_page)
    for line in lines:
        monkeypatch.setattr(sys, "argv", [*shlex.split(line)[1:], *flags])
        runpy.run_path(str(main_py), run_name="__main__")
    config = next(Path("logs").rglob("config.yaml"))
    assert yaml.safe_load(config.read_text())["lora"]["r"] == 2


def test_settings_of_the_command_line_are_the_callbacks() -> None:
    section, entry_of_list = blocks("command-line", "yaml")
    own = yaml.safe_load(section)
    listed = yaml.safe_load(entry_of_list)
    assert LoRACallback(**own["lora"]).merge == "last"
    (entry,) = listed["trainer"]["callbacks"]
    assert entry["class_path"] == "lightning_lora.LoRACallback"
    assert LoRACallback(**entry["init_args"])


def test_commands_of_the_page_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, makes_the_files = blocks("command-line")
    runpy.run_path(str(written(here, [makes_the_files])))
    lines = commands_of("lightning-lora")
    assert len(lines) == 8
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    written_files = {path.stem for path in here.iterdir()}
    assert written_files >= {"merged", "both", "small", "peft_folder"}


def undefined_names(code: str) -> set[str]:
    """The names that code reads and does not define."""
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    written_names = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    imported = set(
        re.findall(
            r"(\w+)(?:,|$)", "\n".join(re.findall(r"import (.*)", code)), re.MULTILINE
        )
    )
    arguments = set(re.findall(r"(\w+)[,)]", "".join(re.findall(r"def .*", code))))
    classes = set(re.findall(r"class (\w+)", code))
    return read - written_names - imported - arguments - classes - set(dir(builtins))


@pytest.mark.parametrize("code", blocks("frameworks"))
def test_a_block_for_another_package_begins_with_what_is_the_readers_own(
    code: str,
) -> None:
    first = code.partition("\n")[0]
    assert first.startswith("# yours: ")
    assert undefined_names(code) <= set(re.findall(r"\w+", first))


@pytest.mark.parametrize("page", BY_HAND)
def test_code_that_was_run_by_hand_is_python_and_its_callbacks_can_be_made(
    page: str,
) -> None:
    code = "\n".join(blocks(page))
    ast.parse(code)
    calls = re.findall(r"LoRACallback\((?:[^()]|\([^()]*\))+\)", code)
    assert len(calls) >= 5
    for call in calls:
        assert eval(call, {"LoRACallback": LoRACallback}).config


def test_pages_that_try_a_module_import_the_one_of_the_examples() -> None:
    importing = set()
    for page in PAGES:
        code = "".join(blocks(page))
        assert "class MyModule" not in code  # one module has this name
        if "from examples.my_module import MyModule    # " in code:
            importing.add(page)
    assert len(importing) >= 15


def test_modules_of_the_pages_do_not_look_untrained() -> None:
    first_steps: dict[str, Any] = {}
    exec(blocks("first-steps")[0], first_steps)
    for model in (first_steps["TextClassifier"](), MyModule()):
        inject_adapters(model, LoRAConfig(modules_to_save=["head"]))
        assert find_untrained(View(model)) == Untrained((), share=0)


REFERENCE = [page for page in PAGES if page.startswith("api-")]


def test_reference_has_every_public_name_once() -> None:
    shown = []
    for page in REFERENCE:
        shown += re.findall(r"^::: lightning_lora\.(\w+)$", PAGES[page], re.MULTILINE)
    assert sorted(shown) == sorted(lightning_lora.__all__)


@pytest.mark.parametrize("page", REFERENCE)
def test_overview_of_the_reference_has_the_first_sentence_of_each_name(
    page: str,
) -> None:
    for path in re.findall(
        r"^::: (lightning_lora\.[\w.]+)$", PAGES[page], re.MULTILINE
    ):
        text = inspect.getdoc(pkgutil.resolve_name(path)) or ""
        first = " ".join(text.partition("\n\n")[0].split())
        first = re.sub(r":\w+:`\.?([^`]*)`", r"`\1`", first).replace("``", "`")
        name = path.rpartition(".")[2]
        assert f"| [`{name}`]({page}.md#{path}) | {first} |" in PAGES["reference"]


def files_in(tree: Any) -> list[str]:
    """The files that a navigation leads to, at all depths."""
    if isinstance(tree, str):
        return [tree]
    files = []
    for entry in tree.values() if isinstance(tree, dict) else tree:
        files += files_in(entry)
    return files


SITE = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())


def test_every_page_is_in_the_site_and_on_its_first_page() -> None:
    files = [f"{page}.md" for page in PAGES]
    assert sorted(files_in(SITE["nav"])) == sorted(files)
    linked = re.findall(r"\]\(([\w-]+)\.md\)", PAGES["index"])
    assert set(linked) == PAGES.keys() - {"index"}


# README


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}.md" for page in PAGES)])
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_rooms_that_the_house_has_are_all_there_are() -> None:
    package = ROOT / "lightning_lora"
    (house,) = re.findall(
        r"^## How the code is organised\n(.*?)^## ",
        PAGES["contributing"],
        re.DOTALL | re.MULTILINE,
    )
    listed = set(re.findall(r"`(\w+\.py|\w+/)`", house))
    there = set()
    for path in package.iterdir():
        there.add(f"{path.name}/" if path.is_dir() else path.name)
    rooms = there - {"py.typed", "__init__.py", "__main__.py", "__pycache__/"}
    inside_rooms = {path.name for path in package.rglob("*/*.py")}
    assert rooms <= listed
    assert listed - rooms <= inside_rooms


def hazards_of_the_page() -> dict[str, list[str]]:
    """The hazards of each section of the page, in its order."""
    found = {}
    for heading, text in re.findall(
        r"^## ([^\n]*)\n(.*?)(?=^##|\Z)",
        PAGES["hazards-list"],
        re.DOTALL | re.MULTILINE,
    ):
        _, *found[heading] = re.findall(
            r"^\| (.*?) \| .* \| .* \|$", text, re.MULTILINE
        )
    return found


def test_every_hazard_has_a_test() -> None:
    """The page has no names of tests: these are in tests/hazards.yaml."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    test_of = yaml.safe_load((ROOT / "tests" / "hazards.yaml").read_text())
    assert {
        heading: list(rows) for heading, rows in test_of.items()
    } == hazards_of_the_page()
    for rows in test_of.values():
        assert len(rows) > 5
        for test in rows.values():
            assert f"def {test}(" in tests


@pytest.mark.parametrize("text", [README, PAGES["index"]], ids=["README", "index"])
def test_the_first_program_stands_below_what_installs_it_and_says_where_it_runs(
    text: str,
) -> None:
    above, _ = text.split("```python", 1)
    assert "pip install ." in above
    assert "pip install path/to/the/clone" in above
    assert "in the clone" in above.lower()
    assert "your own" in above or "of your own" in above


def test_readme_is_short() -> None:
    assert len(README.split()) <= 1300


FIRST, *RECIPES = BLOCKS


FOR_PEFT = 'LoRACallback(r=8, target_slices={"self_attn": ["q", "k", "v"]})'
"""The callback without an attention's output projection, as the page on sharing has it."""


@pytest.fixture
def fitted(here: Path) -> dict[str, Any]:
    """What a reader has after the first program: its names, and a module that has been fitted."""
    return fitted_by(FIRST)


def fitted_by(code: str) -> dict[str, Any]:
    known: dict[str, Any] = {}
    run_block(code, known)
    return known


def run_block(code: str, known: dict[str, Any]) -> None:
    exec(quiet(code), known)


@pytest.mark.filterwarnings("ignore:.*no last checkpoint:UserWarning")
@pytest.mark.parametrize(
    "code", [code for code in RECIPES if "export_peft(" not in code]
)
def test_each_recipe_runs_after_the_first_program(
    code: str, fitted: dict[str, Any]
) -> None:
    run_block(code, fitted)


@pytest.mark.filterwarnings(
    "ignore:.*are layers of nn.TransformerEncoder:lightning_lora.LoRAWarning"
)
def test_the_recipe_for_peft_runs_after_a_training_that_leaves_the_projection_out(
    here: Path,
) -> None:
    assert f"lora = {FOR_PEFT}" in PAGES["sharing"]
    (to_peft,) = [code for code in RECIPES if "export_peft(" in code]
    run_block(to_peft, fitted_by(FIRST.replace("LoRACallback(r=8)", FOR_PEFT)))


# jsonargparse's, about LightningCLI
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_recipe_of_a_command_line_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (main_file,) = [code for code in RECIPES if "LightningCLI" in code]
    (settings,) = blocks_in(README, "yaml")
    Path("lora.yaml").write_text(settings)
    (line,) = re.findall(r"`python (main\.py .*)`", README)
    flags = [
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.fast_dev_run=true",
        "--seed_everything=0",
    ]
    monkeypatch.setattr(sys, "argv", [*shlex.split(line), *flags])
    runpy.run_path(str(written(here, [main_file])), run_name="__main__")


def test_the_first_program_learns_what_it_says(fitted: dict[str, Any]) -> None:
    after, before = re.findall(
        r"loss ([\d.]+) \(untrained: ([\d.]+)\)$", BLOCKS[0], re.MULTILINE
    )[0]
    trainer = fitted["trainer"]
    (found,) = trainer.test(fitted["model"], ckpt_path="best", verbose=False)
    assert found["test_loss"] == pytest.approx(float(after), abs=0.05)
    (found,) = trainer.test(MyModule(), verbose=False)
    assert found["test_loss"] == pytest.approx(float(before), abs=0.05)


def test_files_of_the_recipe_hold_what_was_learned(fitted: dict[str, Any]) -> None:
    (shares,) = [code for code in RECIPES if "save_merged(" in code]
    run_block(shares, fitted)
    made = (fitted["plain"], MyModule.load_from_checkpoint("merged.ckpt"), MyModule())
    fitted_too, merged, base = [
        module.eval()(torch.arange(16)[None]) for module in made
    ]
    learned = fitted["model"].eval()(torch.arange(16)[None])
    assert torch.equal(fitted_too, learned)
    assert torch.equal(merged, learned)
    assert not torch.equal(base, learned)


def test_the_last_recipe_of_a_fitted_module_gives_its_base_back(
    fitted: dict[str, Any],
) -> None:
    (after,) = [code for code in RECIPES if "remove_adapters(" in code]
    run_block(after, fitted)
    assert same(state(fitted["model"]), state(MyModule()))


def test_numbers_that_the_main_job_quotes_are_in_the_readme() -> None:
    code = (ROOT / "examples" / "sentiment.py").read_text()
    quoted = re.findall(r"([\d.]+)% \(README\.md\)", code)
    assert len(quoted) == 2
    for number in quoted:
        assert f"| {number} % |" in README


# The page of messages quotes those that the code has

HEADINGS = re.findall(r"^### (.*)$", PAGES["messages"], re.MULTILINE)
OTHERS = ("Option ", "RuntimeError: ")
"""How the messages of other packages begin."""


def texts() -> list[str]:
    """The texts in the code, with … for what is filled in. Docstrings are left out."""
    found = []
    for path in (ROOT / "lightning_lora").rglob("*.py"):
        found += texts_in(ast.parse(path.read_text()))
    return found


def texts_in(tree: ast.Module) -> list[str]:
    nodes = list(ast.walk(tree))
    alone = {node.value for node in nodes if isinstance(node, ast.Expr)}
    found = []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [text_of(part) for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and node not in alone:
            found.append(text_of(node))
    return found


def text_of(part: ast.expr) -> str:
    """A part of an f-string, or … if it is filled in."""
    return str(part.value) if isinstance(part, ast.Constant) else "…"


TEXTS = texts()


@pytest.mark.parametrize(
    "heading", [heading for heading in HEADINGS if not heading.startswith(OTHERS)]
)
def test_a_message_on_the_page_is_one_of_the_code(heading: str) -> None:
    kind, _, text = heading.partition(": ")
    text = text if kind in lightning_lora.__all__ else heading
    quoted = re.escape(text).replace("…", ".*")
    assert [found for found in TEXTS if re.search(quoted, found, re.DOTALL)], text


def test_every_error_and_warning_is_on_the_page() -> None:
    kinds = {
        name for name in lightning_lora.__all__ if name.endswith(("Error", "Warning"))
    }
    on_the_page = {heading.partition(": ")[0] for heading in HEADINGS}
    assert kinds - {"LoRAError"} == on_the_page & kinds


def test_what_the_ci_takes_from_the_readme_is_there() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    beginnings = re.findall(r'^from_readme "(.+?)"', script, re.MULTILINE)
    assert beginnings
    lines = README.splitlines()
    for beginning in beginnings:
        assert any(beginning in line for line in lines), beginning
