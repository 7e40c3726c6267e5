"""A file restores the trained model on its base."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_lora as ll
from tests.support.cases import file_names, held
from tests.support.fits import fit
from tests.support.models import (
    TRAINED,
    LitTiny,
    X,
    as_merged,
    as_trained,
    is_plain,
    lora,
)
from tests.support.parameters import flags_of
from tests.support.storage import (
    CONFIG,
    fitted,
    refused,
    restores,
    rewrite,
    saved,
    trained,
)


def test_file_is_adapter_sized_and_plain(file: Path) -> None:
    values = sum(value.nbytes for value in ll.adapter_state_dict(trained()).values())
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["lightning_lora"])
    assert file.stat().st_size < values + 4096
    assert about["format"] == 3
    assert ll.LoRAConfig.from_dict(about["config"]) == CONFIG
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    (file.parent / "other").touch()
    # as any file: others may read it
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


@pytest.mark.parametrize("call", [ll.load_adapter, ll.save_adapter])
def test_a_model_in_the_place_of_a_path_is_told(tmp_path: Path, call: Any) -> None:
    with pytest.raises(ll.AdapterFileError, match="a LitTiny was given"):
        call(tmp_path / "a.safetensors", LitTiny())


def test_what_is_no_place_for_adapters_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ll.load_adapter(LitTiny(), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"The folder .*none does not exist"):
        ll.save_adapter(trained(), tmp_path / "none" / "adapter.safetensors")
    with pytest.raises(ll.AdapterFileError, match="folder"):
        ll.load_adapter(LitTiny(), tmp_path)
    with pytest.raises(
        ll.AdapterFileError,
        match=r"does not end in \.safetensors.*'adapter\.safetensors'",
    ):
        ll.save_adapter(trained(), tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


edit = partial(rewrite, checked=False)


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (
        lambda path: path.write_text("hello"),
        "no archive of torch.* begins with b'hello'",
    ),
    "foreign safetensors": (
        lambda path: save_file({"a": torch.zeros(1)}, path),
        "no adapters of this package",
    ),
    "no JSON": (
        lambda path: save_file(load_file(path), path, {"lightning_lora": "["}),
        "damaged or of another kind",
    ),
    "foreign object": (lambda path: torch.save([1, 2], path), "no adapters"),
    "newer format": (
        lambda path: edit(path, lambda about, _: about.update(format=9)),
        "has format 9; expected 3",
    ),
    "another alpha": (
        lambda path: edit(path, lambda about, _: about["config"].update(alpha=8)),
        "not as they were",
    ),
    "fewer tensors": (
        lambda path: edit(path, lambda _, tensors: tensors.popitem()),
        "6 entries, and 7 were written",
    ),
}


@pytest.mark.parametrize("build", [LitTiny, trained])
@pytest.mark.parametrize(("tamper", "says"), TAMPERED.values(), ids=TAMPERED)
def test_tampered_file_is_refused_and_the_model_is_as_it_was(
    file: Path, tamper: Any, says: str, build: Any
) -> None:
    tamper(file)
    model = build()
    with refused(model, ll.AdapterFileError, says):
        ll.load_adapter(model, file)


def on_rows(first: int, last: int) -> dict[str, Any]:
    """A configuration that adapts these rows of the head."""
    return {"target_modules": ["head"], "target_slices": {"head": {"a": (first, last)}}}


def test_adapters_of_other_rows_of_a_weight_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", LitTiny(), **on_rows(0, 2))
    model = as_trained(LitTiny(), **on_rows(2, 4))
    with refused(model, ll.AdapterMismatchError, "adapts other rows of the weight"):
        ll.load_adapter(model, tmp_path / "a.safetensors")


def test_file_loads_where_adapters_were_injected_in_a_part(file: Path) -> None:
    model = saved(file, nn.ModuleDict({"net": LitTiny()}), **CONFIG.to_dict())
    again = nn.ModuleDict({"net": LitTiny()})
    ll.inject_adapters(again["net"], CONFIG)
    restores(file, model, again)


class Projections(nn.Module):
    """The two layers of GPT-3's attention that the paper adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12288, 12288, bias=False)
        self.v = nn.Linear(12288, 12288, bias=False)


def put_factors_on_cpu(layer: Any) -> None:
    for name, factor in layer.lora_parameters().items():
        setattr(layer, name, nn.Parameter(torch.zeros_like(factor, device="cpu")))


def test_gpt3_adapter_file_is_the_papers_35_mb(tmp_path: Path) -> None:
    """Hu et al. 2021, section 4.2: r=4 on W_q and W_v of 96 layers, in fp16: 37.8 million bytes, 36 MiB."""
    with torch.device("meta"):
        model = nn.Sequential(*[Projections() for _ in range(96)]).half()
    ll.inject_adapters(
        model,
        ll.LoRAConfig(r=4, target_modules=["q", "v"], autocast_adapter_dtype=False),
    )
    for block in model:
        put_factors_on_cpu(block.q)
        put_factors_on_cpu(block.v)
    path = tmp_path / "gpt3.safetensors"
    ll.save_adapter(model, path)
    assert path.stat().st_size == pytest.approx(37.8e6, rel=0.002)


def test_adapters_on_a_base_that_was_made_in_inference_mode_are_stored(
    tmp_path: Path,
) -> None:
    with torch.inference_mode():
        model = saved(tmp_path / "a.safetensors", LitTiny())
    restores(tmp_path / "a.safetensors", model)


def test_a_name_may_look_like_several(file: Path) -> None:  # as fsspec chains them
    model = LitTiny()
    ll.load_adapter(model, file)
    other = file.with_name("a::b.safetensors")
    ll.save_adapter(model, other)
    assert other.read_bytes() == file.read_bytes()
    assert len(list(file.parent.iterdir())) == 2


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    ll.save_adapter(trained(), tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "a.safetensors").is_file()


def test_home_folder_and_long_names_are_what_they_are_elsewhere(
    tmp_path: Path, monkeypatch: Any
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    model, t = fit(
        tmp_path, lora(merge=False), max_epochs=1, enable_checkpointing=False
    )
    checkpoints = ["a.ckpt", "v" * 250 + ".ckpt"]
    adapters = ["a.safetensors", "\U0001f40d" * 60 + ".safetensors"]
    for name in checkpoints:
        t.save_checkpoint(f"~/{name}")
        restores(f"~/{name}", model)
    for name in adapters:
        ll.save_adapter(model, f"~/{name}")
        restores(f"~/{name}", model)
    assert file_names(home) == sorted(checkpoints + adapters)


# a module that uses one layer under two names, each in a part of its own
class Shared(LitTiny):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleDict({"q_proj": self.q_proj})


def test_adapters_of_a_shared_layer_are_stored_once(tmp_path: Path) -> None:
    model = fitted(tmp_path / "a.ckpt", Shared())
    assert model.again["q_proj"].lora_A is model.q_proj.lora_A
    assert "again.q_proj.lora_A" in model.state_dict()
    ll.save_adapter(model, tmp_path / "a.safetensors")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(ll.adapter_state_dict(model)) == set(TRAINED)
    assert set(load_file(tmp_path / "a.safetensors")) == set(TRAINED)
    assert set(held(stored)) == set(TRAINED)
    restores(tmp_path / "a.ckpt", model, Shared())
    restores(tmp_path / "a.safetensors", model, Shared())


def test_values_are_stored_however_they_lie_in_memory(tmp_path: Path) -> None:
    model = as_trained(
        LitTiny(), target_modules=["q_proj", "v_proj"], modules_to_save=["head"]
    )
    model.head.weight.data = torch.randn(8, 4).t()
    model.q_proj.lora_A.data = torch.randn(8, 2).t()
    ll.save_adapter(model, tmp_path / "a.safetensors")
    restores(tmp_path / "a.safetensors", model)


def test_load_from_checkpoint_needs_no_trainer(tmp_path: Path) -> None:
    file = tmp_path / "lora.ckpt"
    model = fitted(file, LitTiny(lr=0.01))
    adapted = ll.load_from_checkpoint(LitTiny, file)
    assert torch.equal(adapted(X), model(X))
    assert adapted.hparams["lr"] == 0.01


ON_META = torch.UntypedStorage(0, device="meta")  # every machine has this device


@pytest.mark.parametrize(
    ("map_location", "device"),
    [
        (None, "cpu"),
        ("meta", "meta"),
        (torch.device("meta"), "meta"),
        ({"cpu": "meta"}, "meta"),
        ({"cpu": torch.device("meta")}, "meta"),
        ({"cuda:0": "meta"}, "cpu"),  # the file was not written on this device
        (lambda storage, location: storage, "cpu"),
        (lambda storage, location: None, "cpu"),
        (lambda storage, location: ON_META if location == "cpu" else None, "meta"),
    ],
)
def test_load_from_checkpoint_takes_each_map_location_of_torch(
    map_location: Any, device: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.ckpt"
    model = fitted(file)
    placed = ll.load_from_checkpoint(LitTiny, file, map_location=map_location)
    assert {p.device.type for p in placed.parameters()} == {device}
    if device == "cpu":
        assert torch.equal(placed(X), model(X))


def test_load_from_checkpoint_refuses_what_torch_does_not_take(tmp_path: Path) -> None:
    file = tmp_path / "lora.ckpt"
    fitted(file)
    with pytest.raises(ll.ConfigError, match="map_location=0 is not known"):
        ll.load_from_checkpoint(LitTiny, file, map_location=0)


def test_load_from_checkpoint_merges_for_good_if_asked(tmp_path: Path) -> None:
    file = tmp_path / "lora.ckpt"
    model = fitted(file, LitTiny(lr=0.01))
    merged = ll.load_from_checkpoint(LitTiny, file, merge=True, lr=0.2)
    assert is_plain(merged)
    assert all(flags_of(merged).values())
    assert merged.hparams["lr"] == 0.2
    torch.testing.assert_close(merged(X), model(X))
    # it remembers nothing
    with pytest.raises(ll.AdapterStateError, match="LitTiny has no adapters") as error:
        ll.unmerge_adapters(merged)
    assert "If they were merged for good (load_from_checkpoint with merge=True" in str(
        error.value
    )
    with pytest.raises(ll.AdapterStateError, match="LitTiny has no adapters"):
        ll.remove_adapters(merged)


def test_a_file_that_is_refused_leaves_a_merged_model_with_other_weights_as_it_was(
    tmp_path: Path,
) -> None:
    file = tmp_path / "other.safetensors"
    ll.save_adapter(as_trained(LitTiny(width=6)), file)
    model = as_merged(LitTiny())
    nn.init.zeros_(model.q_proj.weight)
    with (
        pytest.warns(ll.LoRAWarning, match="were replaced"),
        pytest.raises(ll.LoRAError),
    ):
        ll.load_adapter(model, file)
    assert ll.adapters(model) == ("default",)
