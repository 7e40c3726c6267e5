"""The README.md of an exported folder: a hub reads it, its code runs, and nobody's own file is replaced."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from tests.storage.formats.test_export_models import run, tiny
from tests.support.models import Around, LitTiny, data, lora, trainer
from tests.support.peft_export import check_equal, contents, trained

CONFIG = ll.LoRAConfig(
    r=2, alpha=4, target_modules=["q_proj", "v_proj"], use_rslora=True
)
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:For .* pass uniform=True:lightning_lora.LoRAWarning"
    ),
    # which peft asks for
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def blocks(folder: Path) -> list[str]:
    """The code in a card, with the folder's own path."""
    text = (folder / "README.md").read_text()
    text = text.replace("path/of/this/folder", str(folder))
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def execute(code: str, **names: Any) -> dict[str, Any]:
    """Run code of a card. Return its names."""
    exec(code, names)
    return names


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """A tiny Llama from a folder."""
    model = tiny("Llama", "ForCausalLM")
    model.save_pretrained(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base").eval()


# What it says


def test_a_hub_reads_what_it_reads_of_pefts_card(base: Any, tmp_path: Path) -> None:
    ll.export_peft(
        trained(Around(base), CONFIG), tmp_path / "ours", base_name="me/tiny"
    )
    base.config._name_or_path = "me/tiny"
    base.name_or_path = "me/tiny"
    (tmp_path / "theirs").mkdir()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model.create_or_update_model_card(str(tmp_path / "theirs"))
    ours = card(tmp_path / "ours").data
    theirs = card(tmp_path / "theirs").data
    assert ours.to_dict() == theirs.to_dict()


@torch.no_grad()
def test_its_code_loads_the_adapters(base: Any, tmp_path: Path) -> None:
    model = trained(Around(base), CONFIG)
    ll.export_peft(model, tmp_path / "peft")
    loading, arguments = blocks(tmp_path / "peft")
    found = execute(loading)["model"].eval()
    check_equal(run(found), run(model.model))
    assert eval(arguments, {"LoRAConfig": ll.LoRAConfig}) == CONFIG


@torch.no_grad()
def test_its_code_takes_a_base_that_has_no_name(tmp_path: Path) -> None:
    base = tiny("Llama", "ForCausalLM")
    model = trained(Around(base), CONFIG)
    ll.export_peft(model, tmp_path / "peft")
    loading, _ = blocks(tmp_path / "peft")
    assert "LlamaForCausalLM, with the weights from before" in loading
    found = execute(loading.replace("...", "given", 1), given=base)["model"].eval()
    check_equal(run(found), run(model.model))


@torch.no_grad()
def test_its_code_builds_the_base_where_a_head_trained(tmp_path: Path) -> None:
    """PEFT itself would build it with two labels."""
    tiny("Bert", "Model").save_pretrained(tmp_path / "base")
    build = transformers.BertForSequenceClassification.from_pretrained
    base = build(tmp_path / "base", num_labels=3).eval()
    model = trained(
        base,
        ll.LoRAConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
    )
    ll.export_peft(model, tmp_path / "peft")
    loading, _ = blocks(tmp_path / "peft")
    path = repr(str(tmp_path / "base"))
    assert (
        f"base = BertForSequenceClassification.from_pretrained({path})    # as for the "
        "training" in loading
    )
    found = execute(loading.replace(path, f"{path}, num_labels=3"))["model"].eval()
    check_equal(run(found), run(model))


def test_a_folder_of_this_machine_is_no_repository(
    base: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A hub refuses a card whose base_model is none."""
    model = trained(Around(base), CONFIG)
    monkeypatch.chdir(tmp_path)
    for name in (
        tmp_path / "base",
        str(tmp_path / "base"),
        "base",
        "./me/tiny",
        "a/b/c",
        "",
    ):
        ll.export_peft(model, tmp_path / "peft", base_name=name)
        assert card(tmp_path / "peft").data.base_model is None
    assert (
        "# LoRA adapters for LlamaForCausalLM\n"
        in (tmp_path / "peft" / "README.md").read_text()
    )


class Logging(LitTiny):
    """A classifier that logs two numbers."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("step", float(self.global_step))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("epoch", float(self.current_epoch))


@pytest.mark.parametrize("save", ["adapters", "model"])
def test_a_checkpoint_gives_the_metrics_of_its_moment(
    save: str, tmp_path: Path
) -> None:
    model = Logging()
    saves = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path, save_top_k=-1, filename="{epoch}"
    )
    fit = trainer(tmp_path, [lora(save=save, merge=False), saves])
    fit.fit(model, data(), data())
    for epoch in (0, 1):
        folder = tmp_path / f"peft{epoch}"
        file = tmp_path / f"epoch={epoch}.ckpt"
        ll.export_peft(file, folder)
        text = (folder / "README.md").read_text()
        assert f"- epoch: {epoch}\n" in text
        assert f"- step: {4 * epoch + 3}\n" in text
    loss = float(fit.callback_metrics["val_loss"])
    assert f"- val_loss: {loss:.4g}\n" in text
    # whether it still is what was validated, nobody knows
    ll.export_peft(model, tmp_path / "of_model")
    assert "Metrics" not in (tmp_path / "of_model" / "README.md").read_text()


def test_a_sum_has_no_metrics(tmp_path: Path) -> None:
    callback = lora(merge=False, modules_to_save=None, target_modules=["q_proj"])
    fit = trainer(tmp_path, [callback])
    fit.fit(Logging(), data(), data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    file = str(tmp_path / "a.ckpt")
    both = str(tmp_path / "both.safetensors")
    assert main(["combine", file, file, "--out", both]) == 0
    ll.export_peft(both, tmp_path / "peft")
    assert "Metrics" not in (tmp_path / "peft" / "README.md").read_text()


# Whose it is


def small(r: int) -> nn.Module:
    return trained(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=r))


def test_our_own_card_is_replaced(tmp_path: Path) -> None:
    for r in (1, 2):
        ll.export_peft(small(r), tmp_path)
        assert f"r={r}," in (tmp_path / "README.md").read_text()


def test_a_card_that_was_changed_stays(tmp_path: Path) -> None:
    ll.export_peft(small(1), tmp_path)
    readme = tmp_path / "README.md"
    changed = readme.read_text().replace("Trained", "TRAINED")
    readme.write_text(changed)
    with pytest.warns(
        ll.LoRAWarning,
        match="README.md was changed after export_peft wrote it, so it stays",
    ):
        ll.export_peft(small(2), tmp_path)
    assert readme.read_text() == changed
    assert '"r": 2' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("theirs", [b"", b"# Mine\n", b"\xff\xfe"])
def test_a_readme_of_others_stays_without_a_word(theirs: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(theirs)
    ll.export_peft(small(1), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == theirs


def test_a_card_that_cannot_be_written_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: Any
) -> None:
    ll.export_peft(small(1), tmp_path)
    before = contents(tmp_path)
    write = Path.write_bytes

    def write_all_but_cards(path: Path, content: bytes) -> int:
        if "README" in path.name:
            raise OSError("the disk is full")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_all_but_cards)
    with pytest.raises(ll.AdapterFileError, match="the disk is full"):
        ll.export_peft(small(2), tmp_path)
    assert contents(tmp_path) == before
