"""Models, what peft makes of a directory, and the comparison of both."""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    export_peft,
    inject_adapters,
    merge_adapters,
    save_adapter,
)
from lightning_lora.model.view import View
from tests.support.models import randomise
from tests.support.parameters import move_randomly

Run = Callable[[Any], Tensor]


@torch.no_grad()
def trained(base: nn.Module, config: LoRAConfig, scale: float = 0.3) -> nn.Module:
    """A copy of ``base`` with adapters, and with everything that trains changed."""
    model = deepcopy(base).eval()
    inject_adapters(model, config)
    randomise(model, scale=scale)
    view = View(model)
    for name, p in view.adapter_parameters.items():
        if name.endswith("lora_magnitude"):
            p.abs_().add_(0.5)
    move_randomly(view.trainable_base.values(), scale)
    for module in view.saved_modules:
        for buffer in module.buffers():
            buffer.add_(1)
    return model


def read(base: nn.Module, directory: Path, *, merged: bool = False) -> Any:
    """What peft makes of a base and a directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings(
            "error", message=".*(missing adapter keys|unexpected).*"
        )
        model = PeftModel.from_pretrained(deepcopy(base), str(directory)).eval()
        return model.merge_and_unload() if merged else model


def check_equal(there: Tensor, here: Tensor, most: float = 1e-6) -> None:
    assert there.shape == here.shape
    assert (there - here).norm() <= most * here.norm()


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def exports(model: nn.Module, folder: Path, **kwargs: Any) -> Iterator[Path]:
    """Directories from the model and from its file, in both forms, and from the merged model."""
    save_adapter(model, folder / "adapter.safetensors")
    for uniform in (False, True):
        for what, source in (
            ("model", model),
            ("file", folder / "adapter.safetensors"),
        ):
            directory = folder / f"{what}-{uniform}"
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", ".* are also .* merge_and_unload|For .*pass uniform=True"
                )
                export_peft(source, directory, uniform=uniform, **kwargs)
            yield directory


@torch.no_grad()
def check_read(
    base: nn.Module,
    config: LoRAConfig,
    run: Run,
    folder: Path,
    *,
    root: str | None = None,
) -> None:
    """Check that peft computes what is computed here, whatever the directory was made of."""
    base = base.eval()
    model = trained(base, config)
    inner = root if root is not None else ""
    here = run(model.get_submodule(inner))
    plain = run(base.get_submodule(inner))
    assert (here - plain).norm() > 1e-3 * plain.norm()
    directories = list(exports(model, folder, root=root))
    for directory in directories:
        check_equal(run(read(base.get_submodule(inner), directory)), here)
    for from_model, from_file in (directories[:2], directories[2:]):
        assert contents(from_file) == contents(from_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge_adapters(model)
        export_peft(model, folder / "merged", root=root)
    check_equal(run(read(base.get_submodule(inner), folder / "merged")), here)
