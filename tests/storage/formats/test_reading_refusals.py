"""What a PEFT file asks for and this package does not have is refused by name, and the model is as before."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_lora as ll
from tests.storage.formats.test_reading import INDEX
from tests.support.layers import Scaled
from tests.support.peft_reading import Attending, Expert, Experts, Mixed, built, gap, write_peft
from tests.support.storage import refused

PRE = "base_model.model."


def written(folder: Path, make: Callable[[], nn.Module] = Mixed, **config: Any) -> Any:
    return write_peft(folder, built(make), **{"target_modules": ["linear"], **config})


def say(folder: Path, **fields: Any) -> None:
    """Change fields of the configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def hold(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def check_refused(folder: Path, model: nn.Module, error: type[Exception], match: str) -> None:
    with refused(model, error, match):
        ll.load_adapter(model, folder)


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, r"peft_type='IA3'"),
    ({"layer_replication": [[0, 2]]}, r"'layer_replication'"),
    ({"lora_bias": True}, "'lora_bias'"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.*cannot be computed again"),
    ({"lora_alpha": "8"}, "alpha='8'"),
    ({"r": 4}, "has rank 2, but the configuration says 4"),
    ({"rank_pattern": {"lin.*": 1}}, "has rank 2, but the configuration says 1"),
]


@pytest.mark.parametrize(("fields", "match"), FIELDS, ids=str)
def test_what_the_configuration_asks_for(tmp_path: Path, fields: dict[str, Any], match: str) -> None:
    written(tmp_path)
    say(tmp_path, **fields)
    check_refused(tmp_path, built(Mixed), ll.AdapterFileError, match)


def test_harmless_fields_are_ignored_and_missing_ones_are_those_of_peft(tmp_path: Path) -> None:
    expected, model = written(tmp_path, r=8)(INDEX), built(Mixed)
    hold(tmp_path, add({"linear.lora_velora_embed": torch.ones(2)}))  # VeLoRA's, which changes training alone
    harmless = {"velora_config": {"scale": 2}, "runtime_config": {"a": 1}, "use_less": False}
    config = {"peft_type": "LORA", "target_modules": ["linear"], **harmless, "author": "me", "note": ""}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(ll.LoRAWarning, match="sets 'author', which PEFT .* does not know") as told:
        ll.load_adapter(model, tmp_path)
    assert gap(model(INDEX), expected) < 2e-6 and told[0].filename == __file__


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    written(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    check_refused(tmp_path, built(Mixed), ll.AdapterFileError, r"adapter_config\.json")


def test_files_that_are_missing(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "other.json")
    says = r"adapters of PEFT.*adapter_config\.json, which is not there"
    check_refused(tmp_path, built(Mixed), ll.AdapterFileError, says)
    with (tmp_path / "adapter_model.safetensors").open("rb") as file, pytest.raises(ll.AdapterFileError, match=says):
        ll.load_adapter(built(Mixed), file)
    (tmp_path / "adapter_model.safetensors").unlink()
    check_refused(tmp_path, built(Mixed), ll.AdapterFileError, "as a folder it holds no adapters of PEFT")
    check_refused(tmp_path / "nowhere", built(Mixed), FileNotFoundError, "nowhere")


def add(more: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{PRE}{name}": value for name, value in more.items()})


SHAPES = {"A": (2, 8), "B": (8, 2)}
TENSORS: list[tuple[dict[str, Tensor], type[Exception], str]] = [
    ({"head.lora_A.weight": torch.ones(2, 12)}, ll.AdapterFileError, "only one of A and B of"),
    ({"linear.lora_diag": torch.ones(2)}, ll.AdapterFileError, r"'base_model.model.linear.lora_diag'"),
    ({"w.lora_A.weight": torch.ones(2, 2)}, ll.AdapterMismatchError, "it has no 'w'"),
    ({"w.weight": torch.ones(2, 2)}, ll.AdapterMismatchError, r"it has no 'w\.weight'"),
    ({"linear.lora_A.weight": torch.ones(2, 5)}, ll.AdapterMismatchError, r"factors \(2, 5\)"),
    ({"linear.lora_A.weight": torch.full((2, 8), torch.nan)}, ll.AdapterFileError, "NaN"),
    ({"head.weight": torch.ones(2, 12)}, ll.AdapterMismatchError, r"'head.weight' is \(2, 12\)"),
    ({"linear.base_layer.weight": torch.ones(8, 8)}, ll.BaseMismatchError, "differs from that"),
    ({"linear.base_layer.weight": torch.ones(9, 8)}, ll.BaseMismatchError, "tokens were"),
    (
        {f"linear.base_layer.lora_{x}.weight": torch.ones(shape) for x, shape in SHAPES.items()},
        ll.AdapterFileError,
        "two updates of one Linear",
    ),
]


@pytest.mark.parametrize(("more", "error", "match"), TENSORS)
def test_what_the_tensors_are(tmp_path: Path, more: Any, error: type[Exception], match: str) -> None:
    written(tmp_path)
    hold(tmp_path, add(more))
    check_refused(tmp_path, built(Mixed), error, match)


class Blocks(nn.Module):
    """Two blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.ModuleDict({"h": nn.ModuleList([self.block(), self.block()])})

    def block(self) -> nn.Module:
        mlp = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        return nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "mlp": mlp})


TWO: dict[str, Any] = {"target_modules": ["linear", "c_proj"]}
MORE: dict[str, Any] = {**TWO, "use_dora": True, "modules_to_save": ["head", "norm"]}
MORE["trainable_token_indices"] = {"embed": [1, 4]}
ONE: dict[str, Any] = {"target_modules": ["q"], "layers_to_transform": [1]}
STACK: dict[str, Any] = {"target_modules": [], "target_parameters": ["rnn.weight_hh_l0", "up"]}
LACKING: list[tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], str, str]] = [
    (Mixed, TWO, {"target_modules": "(linear|c_.*)"}, "c_proj", "'c_proj'"),
    (Mixed, MORE, {}, r"c_proj\.lora_mag.*", "use_dora=True.*'c_proj'"),
    (Mixed, MORE, {"use_dora": False}, "-", "use_dora=False.*'c_proj', 'linear'"),
    (Mixed, MORE, {}, "head", "names 'head' in"),
    (Mixed, MORE, {}, r"head\.bias", "names 'head' in"),
    (Mixed, MORE, {}, "embed", "'embed: rows'"),
    (Expert, STACK, {}, "rnn", "names 'rnn' in"),
    (Blocks, {"target_modules": ["q", "k"]}, {}, r"m\.h\.1\.k", r"names 'm\.h\.1\.k' in"),
    (Blocks, {"target_modules": ["mlp.0", "mlp.2"]}, {}, r".*mlp\.2", r"'m\.h\.0\.mlp\.2'"),
    (Blocks, {**ONE, "bias": "all"}, {"layers_to_transform": None}, "-", r"names 'm\.h\.0\.q' in"),
]
LEFT: list[tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], str]] = [
    (Blocks, ONE, {"layers_to_transform": None}, r"'m\.h\.0\.q'"),
    (Blocks, ONE, {"layers_to_transform": [0, 1]}, r"'m\.h\.0\.q'"),
    (
        lambda: nn.Sequential(*[nn.ModuleDict({"experts": Experts()}) for _ in "ab"]),
        {"target_modules": [], "target_parameters": ["0.experts.up"]},
        {"target_parameters": ["up"]},
        r"'1\.experts'",
    ),
]


@pytest.mark.parametrize("case", LACKING)
def test_a_file_that_lacks_what_its_configuration_names(tmp_path: Path, case: Any) -> None:
    """PEFT takes start values for these, with a warning at most."""
    make, config, said, dropped, match = case
    written(tmp_path, make, **config)
    say(tmp_path, **said)
    hold(tmp_path, lambda held: [held.pop(name) for name in [*held] if re.match(f"{PRE}{dropped}\\b", name)])
    check_refused(tmp_path, built(make), ll.AdapterFileError, match)


@pytest.mark.parametrize(("make", "config", "said", "match"), LEFT)
def test_a_file_of_another_part_than_its_configuration_names(
    tmp_path: Path, make: Any, config: Any, said: Any, match: str
) -> None:
    """Such as that of an encoder, whose names are those of a decoder too."""
    written(tmp_path, make, **config)
    say(tmp_path, **said)
    with pytest.warns(ll.LoRAWarning, match=f"also names {match} in .*They stay as they are") as told:
        ll.load_adapter(built(make), tmp_path)
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(
    "fields",
    [{}, {"layers_to_transform": 1}, {"layers_to_transform": [0, 1], "layers_pattern": ["h"]},
     {"layers_to_transform": [], "exclude_modules": ["h.0.q"]}, {"layers_to_transform": None, "target_modules": None}],
)  # fmt: skip
def test_layers_that_the_configuration_leaves_out_are_not_missed(tmp_path: Path, fields: dict[str, Any]) -> None:
    written(tmp_path, Blocks, **ONE)
    say(tmp_path, **fields)
    around = nn.ModuleDict({"model": built(Blocks), "other": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    with pytest.warns(ll.LoRAWarning, match="they begin with 'model'"):  # what lies outside was not there
        ll.load_adapter(around, tmp_path)


class Tied(nn.Module):
    """A head that is tied to an embedding, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight


BOTH: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
OLORA: dict[str, Any] = {"target_modules": ["c_proj"], "init_lora_weights": "olora"}
MODELS: list[tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], str]] = [
    (lambda: nn.ModuleDict({"linear": Scaled(4, 4)}), {}, {}, "forward of its own"),
    (Attending, {"target_modules": ["out_proj"]}, {}, "its nn.MultiheadAttention never calls"),
    (Expert, BOTH, {"target_parameters": ["experts.up"]}, r"2 updates of 'experts'.*name \['up'\]"),
    (Tied, {"modules_to_save": ["head"]}, {}, "'head.weight', which is tied to 'embed.weight'"),
    (Mixed, OLORA, {}, "'c_proj' is a Conv1D, trained"),
]


@pytest.mark.parametrize(("make", "config", "said", "match"), MODELS)
def test_what_the_model_is(tmp_path: Path, make: Any, config: Any, said: Any, match: str) -> None:
    written(tmp_path, make, **config)
    say(tmp_path, **said)
    check_refused(tmp_path, built(make), ll.AdapterMismatchError, match)


def test_names_that_fit_in_several_places_or_mean_another_layer(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"linear": nn.Linear(4, 4)})

    written(tmp_path, make)
    model = nn.ModuleDict({"a": make(), "b": make()})
    check_refused(tmp_path, model, ll.AdapterMismatchError, "below 'a', 'b'. Pass one of these")
    other = nn.ModuleDict({"linear": nn.Bilinear(4, 4, 4)})
    check_refused(tmp_path, other, ll.AdapterMismatchError, "'linear'.*no counterpart for our adapter of Bilinear")
    with pytest.warns(ll.LoRAWarning, match=r"have no prefix; in ModuleDict they begin with 'x'"):
        ll.load_adapter(nn.ModuleDict({"x": make()}), tmp_path)


def test_a_second_file_takes_the_place_of_the_first(tmp_path: Path) -> None:
    pissa: dict[str, Any] = {"target_modules": ["linear"], "init_lora_weights": "pissa"}
    written(tmp_path / "a", **pissa)
    b = f"{PRE}linear.lora_B.default.weight"
    other = write_peft(tmp_path / "b", built(Mixed), lambda peft: nn.init.ones_(peft.get_parameter(b)), **pissa)
    ll.load_adapter(model := built(Mixed), tmp_path / "a")
    ll.merge_adapters(model)
    ll.load_adapter(model, tmp_path / "b")
    assert gap(model(INDEX), other(INDEX)) < 2e-6
    ll.merge_adapters(model)
    say(tmp_path / "b", r=4)
    check_refused(tmp_path / "b", model, ll.AdapterFileError, "rank")  # it stays merged
    ll.inject_adapters(model := built(Mixed), ll.LoRAConfig(target_modules=["linear"], r=2, alpha=8))
    check_refused(tmp_path / "a", model, ll.AdapterMismatchError, "init='pissa'")


def test_older_files_and_half_precision(tmp_path: Path) -> None:
    expected = written(tmp_path, modules_to_save=["norm"])(INDEX)
    tensors, old = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin"
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, old)
    for path in (tmp_path, old):
        ll.load_adapter(model := built(Mixed), path)
        assert gap(model(INDEX), expected) < 2e-6
    torch.save({name: value.bfloat16() for name, value in tensors.items()}, old)
    ll.load_adapter(model := built(Mixed), old)
    a = model.get_parameter("linear.lora_A")
    assert a.dtype == torch.float32 and torch.equal(a, tensors[f"{PRE}linear.lora_A.weight"].bfloat16().float())


def test_both_spellings_of_the_magnitude(tmp_path: Path) -> None:
    expected = written(tmp_path, use_dora=True)(INDEX)
    tensors = load_file(path := tmp_path / "adapter_model.safetensors")
    for end in ("vector", "vector.weight"):
        save_file({re.sub(r"vector(\.weight)?$", end, name): value for name, value in tensors.items()}, path)
        ll.load_adapter(model := built(Mixed), tmp_path)
        assert gap(model(INDEX), expected) < 2e-6
    hold(tmp_path, lambda held: held[f"{PRE}linear.lora_magnitude_vector.weight"][:1].zero_())
    check_refused(tmp_path, built(Mixed), ll.AdapterMismatchError, "'linear'.*whose magnitude is zero")


def test_single_tensors_of_the_base_train(tmp_path: Path) -> None:
    written(tmp_path)
    hold(tmp_path, add({"norm.weight": torch.full((12,), 2.0)}))
    ll.load_adapter(model := built(Mixed), tmp_path)
    assert model.get_parameter("norm.weight").eq(2).all() and model.get_parameter("norm.weight").requires_grad
    assert not model.get_parameter("norm.bias").requires_grad
    save_file({f"{PRE}head.weight": torch.ones(3, 12)}, tmp_path / "adapter_model.safetensors")
    check_refused(tmp_path, built(Mixed), ll.AdapterFileError, "no adapters of this package")
