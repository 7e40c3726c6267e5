"""A PEFT folder, imported with a file of the base, is what it is for the model itself."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    LoRAConfig,
    LoRAWarning,
    adapter_state_dict,
    export_peft,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from lightning_lora.storage.offline.combining import How, combine_files
from lightning_lora.storage.offline.importing import import_peft
from lightning_lora.storage.offline.merging import merge_files
from tests.models import TinyLM, randomise, same, state
from tests.storage.foreign.peft.reading_cases import Lit, Mixed, built, gap, read_by_peft, write_peft
from tests.storage.foreign.peft.test_reading import CASES, INDEX


class Oblong(Mixed):
    """Its linear layers are not square: what they are can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.c_proj = nn.Linear(8, 10), Conv1D(12, 10)
        nn.init.normal_(self.c_proj.weight, std=0.3)


BY_THE_MODEL = ("target_parameters", "trainable_token_indices")
"""What only the model can tell."""

TOLD, LEFT = {}, {}
for name, (make, inputs, config) in CASES.items():
    (LEFT if any(word in config for word in BY_THE_MODEL) else TOLD)[name] = (
        Oblong if make is Mixed else make,
        inputs,
        config,
    )


def write_base(path: Path, model: nn.Module, **more: Tensor) -> Path:
    save_file({**{name: value.contiguous() for name, value in model.state_dict().items()}, **more}, path)
    return path


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:The names in the file")
@pytest.mark.parametrize(("make", "inputs", "config"), TOLD.values(), ids=TOLD)
def test_the_file_loads_as_the_folder_does(
    tmp_path: Path, make: Callable[[], nn.Module], inputs: Any, config: dict[str, Any]
) -> None:
    write_peft(tmp_path / "peft", built(make), **config)
    base, out = write_base(tmp_path / "base.safetensors", built(make)), tmp_path / "own.safetensors"
    import_peft(tmp_path / "peft", out, base)
    for around in (lambda model: model, Lit):
        here, there = around(built(make)), around(built(make))
        load_adapter(here, tmp_path / "peft")
        load_adapter(there, out)
        assert same(adapter_state_dict(here), adapter_state_dict(there))
        assert torch.equal(here.eval()(inputs), there.eval()(inputs))


SAME = ["all", "rslora", "dora", "patterns", "saved", "biases of its layers", "all biases"]


@pytest.mark.parametrize("name", [*(f"mixed: {name}" for name in SAME), *(name for name in TOLD if "images" in name)])
def test_an_export_gives_back_the_tensors(tmp_path: Path, name: str) -> None:
    make, inputs, config = TOLD[name]
    config = {**config, "r": min(config.get("r", 2), 3)}  # PEFT's ranks above a layer's size are cut here
    expected = write_peft(tmp_path / "peft", built(make), **config)(inputs)
    import_peft(tmp_path / "peft", tmp_path / "own.safetensors", write_base(tmp_path / "base.safetensors", built(make)))
    export_peft(tmp_path / "own.safetensors", tmp_path / "again")
    before, after = (tensors(tmp_path / folder) for folder in ("peft", "again"))
    before = {name.replace("vector", "vector.weight"): value for name, value in before.items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert gap(read_by_peft(tmp_path / "again", built(make))(inputs), expected) < 1e-6


@pytest.mark.parametrize("name", [name for name in TOLD if "embed" not in str(TOLD[name][2])])
def test_files_are_merged_as_the_model_is(tmp_path: Path, name: str) -> None:
    make, _, config = TOLD[name]
    write_peft(tmp_path / "peft", built(make), **config)
    base, out = write_base(tmp_path / "base.safetensors", built(make)), tmp_path / "own.safetensors"
    import_peft(tmp_path / "peft", out, base)
    merge_files(base, out, tmp_path / "merged.safetensors")
    model = built(make)
    load_adapter(model, tmp_path / "peft")
    merge_adapters(model)
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in model.state_dict().items())


# The base


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """An imported file, with its base and PEFT's folder beside it."""
    write_peft(tmp_path / "peft", built(Oblong), target_modules=["linear"], modules_to_save=["head"])
    base = write_base(tmp_path / "base.safetensors", built(Oblong))
    import_peft(tmp_path / "peft", tmp_path / "own.safetensors", base)
    return tmp_path / "own.safetensors"


@pytest.mark.parametrize("name", ["linear.weight", "embed.weight", "norm.bias"])
def test_another_base_is_refused_when_the_file_is_loaded(imported: Path, name: str) -> None:
    model = built(Oblong)
    model.get_parameter(name).data[0] += 1
    before = state(model)
    with pytest.raises(BaseMismatchError, match=rf"1 of 9 frozen tensors of Oblong differ, such as '{name}'.*--base"):
        load_adapter(model, imported)
    assert same(state(model), before)
    with pytest.warns(LoRAWarning, match="another base: 1 of 9"):
        load_adapter(model, imported, check_base=False)


def test_the_base_in_another_precision_is_known(imported: Path) -> None:
    model = built(Oblong).bfloat16()
    with pytest.warns(LoRAWarning, match="the same base, converted"):
        load_adapter(model, imported)


def test_the_model_may_have_more_tensors_than_the_file_and_less(imported: Path, tmp_path: Path) -> None:
    class More(Oblong):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.arange(3))
            self.extra = nn.ModuleDict({"linear": nn.Linear(8, 10)})

    model = built(Oblong)
    load_adapter(more := built(More), imported)
    load_adapter(model, imported)
    assert torch.equal(more(INDEX), model(INDEX))
    base = write_base(tmp_path / "base.safetensors", built(Oblong), unused=torch.ones(3), counts=torch.arange(3))
    import_peft(tmp_path / "peft", imported, base)
    load_adapter(again := built(Oblong), imported)
    assert torch.equal(again(INDEX), model(INDEX))


def test_a_new_head_need_not_be_in_the_base(imported: Path, tmp_path: Path) -> None:
    base = {name: value for name, value in load_file(tmp_path / "base.safetensors").items() if "head" not in name}
    save_file(base, tmp_path / "body.safetensors")
    found = import_peft(tmp_path / "peft", tmp_path / "new.safetensors", tmp_path / "body.safetensors")
    assert found.layers == ["linear"] and found.beside == ["head.bias", "head.weight"] and found.base == 9
    for path in (imported, tmp_path / "new.safetensors"):
        load_adapter(here := built(Oblong), path)
        load_adapter(there := built(Oblong), tmp_path / "peft")
        assert torch.equal(here(INDEX), there(INDEX))


def test_names_are_those_of_the_model_of_peft(tmp_path: Path) -> None:
    """The base may be saved from inside of it, or from a LightningModule around it."""
    make = lambda: Lit(built(Oblong)).eval()  # noqa: E731
    write_peft(tmp_path / "inner", built(Oblong), target_modules=["linear"])
    write_peft(tmp_path / "outer", make(), target_modules=["linear"])
    write_base(tmp_path / "inner.safetensors", built(Oblong))
    outside = {"norm.weight": torch.full((12,), 7.0)}  # of something else
    torch.save({"state_dict": {**make().state_dict(), **outside}}, tmp_path / "outer.ckpt")
    for folder, model in (("inner", built(Oblong)), ("outer", make())):
        for base in ("inner.safetensors", "outer.ckpt"):
            import_peft(tmp_path / folder, tmp_path / "own.safetensors", tmp_path / base)
            load_adapter(here := deepcopy(model), tmp_path / "own.safetensors")
            load_adapter(there := deepcopy(model), tmp_path / folder)
            assert same(adapter_state_dict(here), adapter_state_dict(there))
            merged = tmp_path / f"merged{Path(base).suffix}"
            merge_files(tmp_path / base, tmp_path / "own.safetensors", merged)
    both = nn.ModuleDict({"ema": built(Oblong), "net": built(Oblong)})
    with pytest.raises(AdapterMismatchError, match="several places: 'ema', 'net'"):
        import_peft(tmp_path / "inner", tmp_path / "own.safetensors", write_base(tmp_path / "both.safetensors", both))


class Around(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=9
        )
        self.model, self.more = BertModel(config), nn.Linear(8, 8)


def test_the_file_loads_around_a_model_that_has_other_weights_beside_it(tmp_path: Path) -> None:
    around = Around()
    around.model.save_pretrained(tmp_path / "base")
    write_peft(tmp_path / "peft", deepcopy(around.model), target_modules=["dense"])
    import_peft(tmp_path / "peft", tmp_path / "own.safetensors", tmp_path / "base")
    here, there = deepcopy(around), deepcopy(around)
    load_adapter(there, tmp_path / "peft")
    with pytest.warns(LoRAWarning, match="have no prefix; in Around they begin with 'model'"):
        load_adapter(here, tmp_path / "own.safetensors")
    assert same(adapter_state_dict(here), adapter_state_dict(there))


def test_a_folder_that_we_wrote_says_which_base_it_is_of(tmp_path: Path) -> None:
    model = Lit(built(Oblong))
    inject_adapters(model, LoRAConfig(r=2, target_modules=["linear"]))
    randomise(model)
    for root in (None, "model"):
        export_peft(model, tmp_path / "peft", root=root)
        out, base = tmp_path / "own.safetensors", write_base(tmp_path / "base.safetensors", built(Oblong))
        import_peft(tmp_path / "peft", out, base)
        other = built(Oblong)
        other.get_parameter("norm.weight").data += 1
        out.unlink()
        with pytest.raises(BaseMismatchError, match=r"frozen tensors of other.safetensors differ.*'norm.weight'"):
            import_peft(tmp_path / "peft", out, write_base(tmp_path / "other.safetensors", other))
        assert not out.exists()


# What is refused


@pytest.mark.parametrize(("make", "inputs", "config"), LEFT.values(), ids=LEFT)
def test_what_only_the_model_can_tell_is_refused_by_name(
    tmp_path: Path, make: Callable[[], nn.Module], inputs: Any, config: dict[str, Any]
) -> None:
    write_peft(tmp_path / "peft", built(make), **config)
    base = write_base(tmp_path / "base.safetensors", built(make))
    name = (config.get("target_parameters") or [*config["trainable_token_indices"]])[0]
    with pytest.raises(AdapterFileError, match=rf"'{name}'.*load_adapter\(model, folder\)"):
        import_peft(tmp_path / "peft", tmp_path / "own.safetensors", base)
    assert not (tmp_path / "own.safetensors").exists()


def no_layer(base: dict[str, Tensor]) -> None:
    del base["linear.weight"], base["linear.bias"]


def no_weight(base: dict[str, Tensor]) -> None:
    del base["linear.weight"]


def other_shape(base: dict[str, Tensor]) -> None:
    base["linear.weight"] = torch.ones(11, 8)


def quantised(base: dict[str, Tensor]) -> None:
    base["linear.weight"] = torch.ones(40, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_layer, r"base.safetensors has no layers 'linear'.*such as 'c_proj.bias'"),
        (no_weight, r"base.safetensors has no weight of 'linear'"),
        (other_shape, r"'linear' is \(11, 8\) in .*'A': \(2, 8\), 'B': \(10, 2\)"),
        (quantised, r"has a weight of torch.uint8 of 'linear'.*not quantised"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_name(
    imported: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    base = load_file(tmp_path / "base.safetensors")
    change(base)
    save_file(base, tmp_path / "base.safetensors")
    imported.unlink()
    with pytest.raises(AdapterMismatchError, match=says):
        import_peft(tmp_path / "peft", imported, tmp_path / "base.safetensors")
    assert not imported.exists()


def test_other_methods_and_other_files_are_refused_by_name(imported: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    with pytest.raises(AdapterFileError, match="a file of this package already"):
        import_peft(imported, out, base)
    with pytest.raises(AdapterFileError, match=r"does not end in \.safetensors"):
        import_peft(tmp_path / "peft", tmp_path / "new.ckpt", base)
    with pytest.raises(FileNotFoundError, match="nothing"):
        import_peft(tmp_path / "peft", out, tmp_path / "nothing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="holds no adapters of PEFT"):
        import_peft(tmp_path / "empty", out, base)
    config = tmp_path / "peft" / "adapter_config.json"
    save_file({"base_model.model.linear.ia3_l": torch.ones(8)}, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="holds no adapters of PEFT"):
        import_peft(tmp_path / "peft", out, base)
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    with pytest.raises(AdapterFileError, match=r"peft_type='IA3'\. Only 'LORA' can be read"):
        import_peft(tmp_path / "peft", out, base)
    assert not out.exists()


class Square(nn.Module):
    """A square layer beside another one of the same or of another name."""

    def __init__(self, own: type[nn.Module], other: type[nn.Module], name: str) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_proj": own(8, 8)})
        self.mlp = nn.ModuleDict({name: Conv1D(12, 8) if other is Conv1D else nn.Linear(8, 12)})
        for layer in (self.attn["c_proj"], self.mlp[name]):
            nn.init.normal_(layer.weight, std=0.3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        (last,) = self.mlp.values()
        return last(self.attn["c_proj"](x))


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_proj", "c_fc"]])
@pytest.mark.parametrize(
    ("own", "other", "name", "is_told"),
    [
        (Conv1D, Conv1D, "c_proj", True),
        (nn.Linear, nn.Linear, "c_fc", True),
        (Conv1D, Conv1D, "c_fc", False),
        (nn.Linear, Conv1D, "c_fc", False),
        (Conv1D, nn.Linear, "c_fc", False),
    ],
)
def test_a_square_layer_is_told_by_the_others_or_refused(
    tmp_path: Path, own: type[nn.Module], other: type[nn.Module], name: str, is_told: bool, targets: list[str]
) -> None:
    make = lambda: built(lambda: Square(own, other, name))  # noqa: E731
    base, out = write_base(tmp_path / "base.safetensors", make()), tmp_path / "own.safetensors"
    write_peft(tmp_path / "peft", make(), target_modules=targets)
    if not is_told and not (other is nn.Linear and len(targets) == 2):  # PEFT keeps the kind of the last layer alone
        with pytest.raises(AdapterFileError, match=r"'attn.c_proj' are square.*load_adapter"):
            import_peft(tmp_path / "peft", out, base)
        return
    import_peft(tmp_path / "peft", out, base)
    load_adapter(model := make(), tmp_path / "peft")
    if not is_told:
        with pytest.raises(AdapterMismatchError, match=r"'attn.c_proj' is a Conv1D in Square.*taken it for a Linear"):
            load_adapter(make(), out)
        return
    merge_files(base, out, tmp_path / "merged.safetensors")
    merge_adapters(model)
    assert same(state(model), {name: load_file(tmp_path / "merged.safetensors")[name] for name in state(model)})
    export_peft(out, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (own is Conv1D)


# What the files cannot show, and the model does


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_own_forward(model: Any) -> None:
    model.linear.__class__ = Scaled


def with_dilation(model: Any) -> None:
    model.conv1d.dilation = (2,)


def with_a_tied_head(model: Any) -> None:
    model.other = nn.Linear(12, 3)
    model.other.weight = model.head.weight


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_own_forward, "'linear' is a Scaled with a forward of its own"),
        (with_dilation, "'conv1d' has dilation"),
        (with_a_tied_head, "'head.weight', which is tied to 'other.weight'"),
    ],
)
def test_a_model_that_computes_otherwise_refuses_the_file(
    tmp_path: Path, change: Callable[[nn.Module], None], says: str
) -> None:
    write_peft(tmp_path / "peft", built(Oblong), target_modules=["linear", "conv1d"], modules_to_save=["head"])
    out = tmp_path / "own.safetensors"
    import_peft(tmp_path / "peft", out, write_base(tmp_path / "base.safetensors", built(Oblong)))
    model = built(Oblong)
    change(model)
    before = state(model)
    with pytest.raises(AdapterMismatchError, match=says):
        load_adapter(model, out)
    assert same(state(model), before)


def test_an_embedding_that_may_be_tied_is_not_merged_into_a_file(tmp_path: Path) -> None:
    """A base that does not tie it holds the output layer too."""
    base, out = tmp_path / "base.safetensors", tmp_path / "own.safetensors"
    for tied in (True, False):
        model = TinyLM(tied=tied)
        write_peft(tmp_path / "peft", deepcopy(model), target_modules=["embed"])
        held = {name: value for name, value in model.state_dict().items() if not tied or name != "lm_head.weight"}
        save_file(held, base)
        torch.save(model.state_dict(), tmp_path / "base.ckpt")
        for path in (base, tmp_path / "base.ckpt"):
            import_peft(tmp_path / "peft", out, path)
            if not tied:
                merge_files(path, out, tmp_path / f"merged{path.suffix}")
                continue
            with pytest.raises(AdapterMismatchError, match=r"'embed.weight' may be tied.*merge_adapters"):
                merge_files(path, out, tmp_path / f"merged{path.suffix}")


def test_the_base_is_only_read(imported: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    torch.save(load_file(base), tmp_path / "base.pt")
    write_peft(tmp_path / "peft", built(Oblong), target_modules=["linear"], modules_to_save=["head"], bias="all")
    for path in (base, tmp_path / "base.pt"):
        before = path.read_bytes()
        import_peft(tmp_path / "peft", imported, path)
        assert path.read_bytes() == before


def test_an_imported_file_is_combined_with_one_of_the_same_base(tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", built(Oblong), target_modules=["linear"])
    base, out = write_base(tmp_path / "base.safetensors", built(Oblong)), tmp_path / "imported.safetensors"
    import_peft(tmp_path / "peft", out, base)
    load_adapter(first := built(Oblong), out)
    for name, change in (("same", 0), ("other", 1)):
        second = built(Oblong)
        second.get_parameter("linear.weight").data[0] += change
        inject_adapters(second, LoRAConfig(r=2, target_modules=["linear"]))
        randomise(second)
        save_adapter(second, tmp_path / f"{name}.safetensors")
        files = [out, tmp_path / f"{name}.safetensors"]
        if change:
            with pytest.raises(BaseMismatchError, match="different bases"):
                combine_files(files, tmp_path / "sum.safetensors", How("cat", (1.0, 1.0)))
            continue
        combine_files(files, tmp_path / "sum.safetensors", How("cat", (1.0, 1.0)))
        load_adapter(both := built(Oblong), tmp_path / "sum.safetensors")
        merged, plain = [], built(Oblong).get_parameter("linear.weight")
        for model in (first, second, both):
            merge_adapters(model)
            merged.append(model.get_parameter("linear.weight") - plain)
        torch.testing.assert_close(merged[2], merged[0] + merged[1])
