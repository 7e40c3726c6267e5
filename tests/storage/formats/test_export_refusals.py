"""What PEFT cannot hold is refused by name, and nothing is written."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    AdapterStateError,
    ConfigError,
    ExportError,
    LoRAConfig,
    export_peft,
    inject_adapters,
    register_adapter,
    save_adapter,
)
from lightning_lora.layers import ADAPTERS
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.model.view import View
from tests.storage.test_layout import write
from tests.support.models import LitTiny, TinyLM, same, state
from tests.support.peft_export import trained


@contextmanager
def refused(match: str, folder: Path, error: type[Exception] = ExportError) -> Iterator[Path]:
    """Expect an error, and no directory."""
    with pytest.raises(error, match=match):
        yield folder / "peft"
    assert not (folder / "peft").exists()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScaledEmbedding(nn.Embedding):
    def forward(self, index: Tensor) -> Tensor:
        return 2 * super().forward(index)


class Stacks(nn.Module):
    def __init__(self, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.up, self.is_transposed, self.fc = nn.Parameter(torch.randn(shape)), is_transposed, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up


@pytest.mark.parametrize(
    ("layer", "config", "match"),
    [
        (nn.ConvTranspose1d(4, 4, 3), {}, "no counterpart for our adapter of ConvTranspose1d"),
        (nn.EmbeddingBag(4, 4), {}, "no counterpart for our adapter of EmbeddingBag"),
        (nn.Bilinear(4, 4, 4), {}, "no counterpart for our adapter of Bilinear"),
        (nn.Conv2d(4, 4, 3, dilation=(1, 2)), {}, r"dilation=.*1, 2.*exclude_modules"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), {}, "padding_mode='circular'"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, "groups=2.*the channels of all groups"),
        (Scaled(4, 4), {}, "Scaled has a forward of its own"),
        (ScaledEmbedding(4, 4), {}, "ScaledEmbedding has a forward of its own"),
        (nn.MultiheadAttention(4, 2), {}, r"twice.*target_slices=\{'layer': \['q', 'k', 'v'\]\}"),
        (nn.MultiheadAttention(4, 2, kdim=3), {"target_slices": {"layer": ["q"]}}, "kdim or vdim"),
        (Stacks(4, 4), {"target_parameters": ["fc.weight"]}, r"fc.weight.*belong to layers inside"),
        (Stacks(1, 4, 4, is_transposed=True), {"target_parameters": ["up"]}, "wrong way round"),
    ],
)
def test_layers_that_peft_lacks_or_computes_otherwise(
    layer: nn.Module, config: dict[str, Any], match: str, tmp_path: Path
) -> None:
    base = nn.ModuleDict({"layer": layer, "other": nn.Linear(4, 4)})
    targets = "all" if "target_parameters" not in config else ["other"]
    model = trained(base, LoRAConfig(r=2, target_modules=targets, **config))
    save_adapter(model, tmp_path / "adapter.safetensors")
    for source in (model, tmp_path / "adapter.safetensors"):
        with refused(f"'layer': .*({match})", tmp_path) as directory:
            export_peft(source, directory)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.x = Stacks(4, 4), nn.Linear(4, 4)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class LoRAOwn(LoRALinear):
    """An adapter that computes something else than PEFT's of the same layer."""


@pytest.mark.parametrize(("layer_class", "adapter_class"), [(Own, LoRALinear), (Own, LoRAOwn), (nn.Linear, LoRAOwn)])
def test_what_a_user_has_registered(layer_class: Any, adapter_class: Any, tmp_path: Path) -> None:
    """PEFT has adapters for some of ours: another one is refused until it is known."""
    layer = Own() if layer_class is Own else nn.Linear(4, 4)
    with registered(layer_class, adapter_class):
        model = trained(nn.Sequential(layer), LoRAConfig(r=2, target_modules="all"))
        save_adapter(model, tmp_path / "adapter.safetensors")
        for source in (model, tmp_path / "adapter.safetensors"):
            with refused(
                f"'0': PEFT has no counterpart for .*{layer_class.__name__}.*merge_adapters", tmp_path
            ) as directory:
                export_peft(source, directory)


@contextmanager
def registered(layer_class: Any, adapter_class: Any) -> Iterator[None]:
    """Register an adapter class for a while."""
    before, types = dict(ADAPTERS), adapter_class.__dict__.get("lora_layer_types", ())
    register_adapter(layer_class, adapter_class)
    try:
        yield
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(before)
        adapter_class.lora_layer_types = types


def test_a_layer_that_is_used_twice(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    model = trained(nn.Sequential(shared, shared), LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter.safetensors")
    for source in (model, tmp_path / "adapter.safetensors"):
        with refused("'0': the layer is used as '1' too", tmp_path) as directory:
            export_peft(source, directory)


def test_parameters_inside_of_a_module_with_parameters(tmp_path: Path) -> None:
    base = nn.Sequential(Stacks(4, 4))
    base[0].rnn = nn.GRU(4, 4)
    config = LoRAConfig(r=2, target_modules=["rnn"], target_parameters=["up"])
    with refused("'0.rnn': PEFT finds no parameters inside of '0'", tmp_path) as directory:
        export_peft(trained(base, config), directory)


def test_a_magnitude_of_zero(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    model = trained(base, LoRAConfig(r=2, use_dora=True))
    with torch.no_grad():
        View(model).adapters["0.lora_magnitude"][1] = 0
    with refused("'0': .*magnitude is zero", tmp_path) as directory:
        export_peft(model, directory)


def test_the_root_itself(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    with refused("not the module itself", tmp_path) as directory:
        export_peft(trained(base, LoRAConfig(r=2)), directory, root="0")
    with refused(r"root='1' holds no adapted layer", tmp_path, ConfigError) as directory:
        export_peft(trained(base, LoRAConfig(r=2)), directory, root="1")
    with refused("Expected a path", tmp_path, AdapterFileError) as directory:
        export_peft(3, directory)  # type: ignore[arg-type]
    with refused("has no adapters", tmp_path, AdapterStateError) as directory:
        export_peft(base, directory)


@pytest.mark.parametrize(
    ("names", "saved", "match"),
    [
        (("fc", "out_fc"), ["fc"], "'fc', and PEFT would also save 'out_fc'"),
        (("x", "fc"), ["fc.weight"], "no place for 'fc.weight'.*single parameters"),
    ],
)
def test_modules_to_save_that_peft_reads_otherwise(
    names: tuple[str, ...], saved: list[str], match: str, tmp_path: Path
) -> None:
    base = nn.ModuleDict({name: nn.Linear(4, 4) for name in (*names, "q")})
    model = trained(base, LoRAConfig(r=2, target_modules=["q"], modules_to_save=saved))
    with refused(match, tmp_path) as directory:
        export_peft(model, directory)


def test_modules_to_save_inside_of_a_module_with_parameters(tmp_path: Path) -> None:
    config = LoRAConfig(r=2, target_modules=["x"], target_parameters=["inner.up"], modules_to_save=["fc"])
    with refused("'inner.fc', inside of a module whose parameters", tmp_path) as directory:
        export_peft(trained(Outer(), config), directory)


def test_a_tied_head_that_is_trained_whole(tmp_path: Path) -> None:
    model = trained(TinyLM(), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with refused("no place for 'embed.weight'.*tied", tmp_path) as directory:
        export_peft(model, directory)


def test_buffers_and_frozen_weights_that_changed(tmp_path: Path) -> None:
    base = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    model = trained(base, LoRAConfig(r=2))
    with torch.no_grad():
        model.norm.running_mean.add_(1)
    with refused("no place for 'norm.running_mean'", tmp_path) as directory:
        export_peft(model, directory)
    model = trained(base, LoRAConfig(r=2))
    View(model).record.adapter.originals["norm.weight"] = base.norm.weight.detach() + 1  # as after a load
    with refused("no place for 'norm.weight'.*frozen weights that changed", tmp_path) as directory:
        export_peft(model, directory)


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"count": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = trained(nn.ModuleDict({"q": nn.Linear(4, 4), "x": Counting(4, 4)}), LoRAConfig(r=2, target_modules=["q"]))
    with refused("'x._extra_state'", tmp_path) as directory:
        export_peft(model, directory)


def test_values_that_are_not_finite_or_not_there(tmp_path: Path) -> None:
    model = trained(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    with torch.no_grad():
        View(model).adapters["0.lora_A"][0, 0] = torch.nan
    with refused("'0.lora_A' in Sequential hold NaN", tmp_path, AdapterFileError) as directory:
        export_peft(model, directory)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    with refused("meta device", tmp_path, AdapterStateError) as directory:
        export_peft(model, directory)


def test_files_that_say_too_little(tmp_path: Path) -> None:
    model = trained(LitTiny(), LoRAConfig(r=2, target_modules=["q_proj"]))
    old = write(tmp_path / "old.ckpt", model, format=2, layers=None, root=None, saved=None)
    with refused(
        "does not say what the adapted layers are.*Load it onto its model", tmp_path, AdapterFileError
    ) as directory:
        export_peft(old, directory)
    model = trained(LitTiny(), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]))
    with refused("what belongs to modules_to_save", tmp_path, AdapterFileError) as directory:
        export_peft(write(tmp_path / "saved.ckpt", model, saved=None), directory)
    base = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    inject_adapters(base, LoRAConfig(r=2, modules_to_save=["norm"]))
    save_adapter(base, tmp_path / "fresh.safetensors")
    with refused("does not hold 'norm.running_mean'.*export the model", tmp_path) as directory:
        export_peft(tmp_path / "fresh.safetensors", directory)
    export_peft(base, tmp_path / "peft")
    with pytest.raises(FileNotFoundError):
        export_peft(tmp_path / "none.safetensors", tmp_path / "other")


# Writing


def test_other_files_stay_and_a_model_does_not_change(tmp_path: Path) -> None:
    model, other = trained(LitTiny(), LoRAConfig(r=2)), trained(LitTiny(), LoRAConfig(r=3))
    before = state(model)
    (tmp_path / "README.md").write_text("a card")
    export_peft(model, tmp_path)
    export_peft(other, tmp_path)
    assert same(state(model), before) and (tmp_path / "README.md").read_text() == "a card"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("failing", ["write_text", "write_bytes", "replace"])
@pytest.mark.parametrize("call", [0, 1])
def test_both_files_are_written_or_none(
    failing: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader never finds weights with the configuration of others."""
    first = trained(LitTiny(), LoRAConfig(r=2, alpha=3))
    second = trained(LitTiny(), LoRAConfig(r=2, alpha=30), scale=0.7)
    export_peft(first, tmp_path / "old")
    pairs = [_pair(tmp_path / "old")]
    export_peft(second, tmp_path / "new")
    pairs.append(_pair(tmp_path / "new"))
    own, calls = getattr(Path, failing), []

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        if len(calls) - 1 == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return own(path, *args, **kwargs)

    for directory in ("old", "fresh"):
        calls.clear()
        with monkeypatch.context() as context:
            context.setattr(Path, failing, fail)
            try:
                export_peft(second, tmp_path / directory)
            except AdapterFileError:
                assert directory == "old" or not (tmp_path / "fresh" / "adapter_config.json").exists()
        held = _pair(tmp_path / directory)
        assert held in pairs or held[0] is None


def _pair(directory: Path) -> tuple[bytes | None, Any]:
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    tensors = {name: value.tolist() for name, value in load_file(weights).items()} if weights.exists() else None
    return config.read_bytes() if config.exists() else None, tensors


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = trained(LitTiny(), LoRAConfig(r=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFileError, match="is a file"):
        export_peft(model, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="No such file"):
        export_peft(model, tmp_path / "none" / "peft")
    with pytest.raises(AdapterFileError, match="Expected a path"):
        export_peft(model, model)  # type: ignore[arg-type]
    (tmp_path / "odd" / "adapter_model.safetensors").mkdir(parents=True)
    with pytest.raises(AdapterFileError, match="is not a file"):
        export_peft(model, tmp_path / "odd")
    assert not (tmp_path / "odd" / "adapter_config.json").exists()
