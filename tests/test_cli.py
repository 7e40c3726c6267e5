"""LightningCLI takes the callback from YAML and from flags."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_lora import LoRACallback
from tests.support.models import LitTiny, data, trainer

# jsonargparse's, about LightningCLI
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUIET = [
    "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.logger=false",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--seed_everything=3",
]  # fmt: skip


# LitTiny with its own data, and with the optimizer left to the CLI
class CLIModule(LitTiny):
    def train_dataloader(self) -> Any:
        return data()

    test_dataloader = train_dataloader
    # LightningModule's: not overridden
    configure_optimizers = LitTiny.__mro__[1].configure_optimizers


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns if it finds pytest's
    monkeypatch.setattr(sys, "argv", ["main.py"])


def run(
    tmp_path: Path, *arguments: str, cls: type[LightningCLI] = LightningCLI
) -> LightningCLI:
    """LightningCLI with these arguments. Without a command, it runs none."""
    args = [*arguments, *QUIET, f"--trainer.default_root_dir={tmp_path}"]
    return cls(
        CLIModule,
        args=args,
        run=not arguments[0].startswith("-"),
        save_config_callback=None,
    )


def callback_of(cli: LightningCLI) -> LoRACallback:
    (callback,) = [
        each for each in cli.trainer.callbacks if isinstance(each, LoRACallback)
    ]
    return callback


OPTIMIZER = [
    "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.05", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.9",
]  # fmt: skip


def flags(**arguments: str) -> list[str]:
    values = [
        f"--trainer.callbacks.{name}={value}" for name, value in arguments.items()
    ]
    return [*OPTIMIZER, "--trainer.callbacks+=lightning_lora.LoRACallback", *values]


def test_yaml_fits_resumes_and_tests(tmp_path: Path) -> None:
    options = {
        "r": 2,
        "alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["head"],
        "merge": "last",
    }
    save = {
        "class_path": "ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "filename": "end"},
    }
    monitor = {
        "class_path": "lightning_lora.LoRAMonitor",
        "init_args": {"every_n_steps": 2, "per_layer": True},
    }
    callbacks = [
        {"class_path": "lightning_lora.LoRACallback", "init_args": options},
        monitor,
        save,
    ]
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}}
    config = {"trainer": {"callbacks": callbacks}, "optimizer": optimizer}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fit = run(tmp_path, "fit", f"--config={tmp_path / 'config.yaml'}")
    assert callback_of(fit).config.scaling("q_proj") == 2.0
    assert "lora/update_norm/q_proj" in fit.trainer.callback_metrics
    test = run(
        tmp_path,
        "test",
        f"--config={tmp_path / 'config.yaml'}",
        f"--ckpt_path={tmp_path / 'end.ckpt'}",
    )
    expected = trainer(tmp_path).test(fit.model, data(), verbose=False)[0]["test_loss"]
    assert float(test.trainer.callback_metrics["test_loss"]) == pytest.approx(expected)
    resume = run(
        tmp_path,
        "fit",
        f"--config={tmp_path / 'config.yaml'}",
        f"--ckpt_path={tmp_path / 'end.ckpt'}",
    )
    assert resume.trainer.global_step == 4


@pytest.mark.parametrize("scale", [10, {"A": 10, "B": 160}])
def test_a_scale_of_rates_is_a_flag_and_in_yaml(tmp_path: Path, scale: Any) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lora": {"lr_scale": scale}}))
    for given in (f"--lora.lr_scale={scale}", f"--config={tmp_path / 'config.yaml'}"):
        cli = run(tmp_path, *OPTIMIZER, given, cls=LoRACLI)
        assert callback_of(cli).lr_scale == scale
    cli.trainer.fit(cli.model)
    rates = [group["lr"] / 0.045 for group in cli.trainer.optimizers[0].param_groups]
    assert rates == pytest.approx(
        [1, *(scale.values() if isinstance(scale, dict) else [scale])]
    )


def test_flags_and_an_optimizer_that_the_cli_builds_train_in_two_fits(
    tmp_path: Path,
) -> None:
    cli = run(
        tmp_path,
        *flags(
            r="2", modules_to_save="[head]", merge="false", rank_pattern="{v_proj: 1}"
        ),
    )
    assert callback_of(cli).config.rank("v_proj") == 1
    assert callback_of(cli).merge is False
    x = torch.arange(20)
    outputs = [CLIModule()(torch.arange(20))]
    for epochs in (1, 2):
        cli.trainer.fit_loop.max_epochs = epochs
        cli.trainer.fit(cli.model)
        outputs.append(cli.model(x))
        assert not torch.equal(outputs[-1], outputs[-2])
    assert all(
        p.any() for name, p in cli.model.named_parameters() if name.endswith("lora_B")
    )
    assert len(cli.trainer.optimizers[0].param_groups[0]["params"]) == 6


@pytest.mark.parametrize("bad", [{"r": "0"}, {"r": "two"}, {"rank": "2"}])
def test_bad_flag_is_refused_by_name(
    tmp_path: Path, bad: dict[str, str], capsys: Any
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        run(tmp_path, "fit", *flags(**bad))
    assert next(iter(bad)) in capsys.readouterr().err + str(error.value)


CHOICES = {
    "merge": ["'last'", "'best'", "False"],
    "bias": ["'none'", "'all'", "'lora_only'"],
    "init": ["'kaiming'", "'gaussian'", "'pissa'", "'olora'"],
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_mistyped_choice_is_refused_with_the_choices(
    tmp_path: Path, name: str, capsys: Any
) -> None:
    listed = {"class_path": "lightning_lora.LoRACallback", "init_args": {name: "bset"}}
    (tmp_path / "list.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [listed]}})
    )
    (tmp_path / "section.yaml").write_text(yaml.safe_dump({"lora": {name: "bset"}}))
    for wrong in (
        f"--config={tmp_path}/list.yaml",
        f"--config={tmp_path}/section.yaml",
        f"--lora.{name}=bset",
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, "fit", *OPTIMIZER, wrong, cls=LoRACLI)
        said = capsys.readouterr().err.partition("error: ")[2]
        assert name in said
        assert "bset" in said
        assert [choice for choice in CHOICES[name] if choice not in said] == []


def test_help_explains_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        LightningCLI(
            CLIModule,
            args=["fit", "--trainer.callbacks.help=lightning_lora.LoRACallback"],
        )
    shown = capsys.readouterr().out
    for option in LoRACallback.__init__.__annotations__.keys() - {"return"}:
        assert f".{option} " in shown
    assert not [
        option
        for option in ("loraplus", "args", "kwargs", "lora_alpha")
        if f"callbacks.{option}" in shown
    ]
    assert "Rank of the update" in shown
    assert "ModelCheckpoint's best file" in " ".join(shown.split())


# the callback's arguments as flags of their own, as the guide shows it
class LoRACLI(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(Noted, "lora")
        parser.set_defaults({"lora.modules_to_save": ["head"]})


class Noted(LoRACallback):  # a subclass that hands its arguments on
    def __init__(self, note: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.note = note
