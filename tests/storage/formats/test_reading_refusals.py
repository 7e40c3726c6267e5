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
from tests.support.models import TinyLM
from tests.support.peft_reading import Attending, Expert, Mixed, built, gap, write_peft
from tests.support.storage import refused

PRE = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Change = Callable[[Path], object]


def written(folder: Path, make: Callable[[], nn.Module] = Mixed, **config: Any) -> Any:
    return write_peft(folder, built(make), **{"target_modules": ["linear"], **config})


def check_refused(
    folder: Path, model: nn.Module, error: type[Exception], match: str
) -> None:
    with refused(model, error, match):
        ll.load_adapter(model, folder)


def asks(**fields: Any) -> Change:
    """Change fields of the configuration."""

    def change(folder: Path) -> None:
        path = folder / PEFT_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def holds(more: dict[str, Tensor]) -> Change:
    """Add tensors, or replace them."""

    def change(folder: Path) -> None:
        path = folder / WEIGHTS
        save_file(
            load_file(path) | {f"{PRE}{name}": value for name, value in more.items()},
            path,
        )

    return change


def lacks(pattern: str) -> Change:
    """Leave out tensors whose names begin so."""

    def change(folder: Path) -> None:
        path = folder / WEIGHTS
        held = load_file(path)
        save_file(
            {
                name: held[name]
                for name in held
                if not re.match(f"{PRE}{pattern}\\b", name)
            },
            path,
        )

    return change


def exchanges(a: Any, b: Any) -> Change:
    """Give A and B of a layer these names in the header, which says what PEFT has renamed."""

    def change(folder: Path) -> None:
        path = folder / WEIGHTS
        names = {"linear.lora_A.weight": a, "linear.lora_B.weight": b}
        save_file(load_file(path), path, {"lightning_lora_names": json.dumps(names)})

    return change


def with_magnitudes(folder: Path) -> None:
    """Make it a file of DoRA, with a magnitude for each adapter."""
    wrapped = [
        name.removeprefix(PRE).removesuffix(".lora_A.weight")
        for name in load_file(folder / WEIGHTS)
        if name.endswith("lora_A.weight")
    ]
    asks(use_dora=True)(folder)
    holds({f"{name}.lora_magnitude_vector": torch.ones(8) for name in wrapped})(folder)


class Blocks(nn.Module):  # two blocks in a list
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.ModuleDict({"h": nn.ModuleList([self.block(), self.block()])})

    def block(self) -> nn.Module:
        mlp = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        return nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "mlp": mlp})


FILE = ll.AdapterFileError
MODEL = ll.AdapterMismatchError
BASE = ll.BaseMismatchError
TWO: dict[str, Any] = {"target_modules": ["linear", "c_proj"]}
ROWS: dict[str, Any] = {**TWO, "trainable_token_indices": {"embed": [1, 4]}}
MORE: dict[str, Any] = {**ROWS, "use_dora": True, "modules_to_save": ["head", "norm"]}
ONE: dict[str, Any] = {"target_modules": ["q"], "layers_to_transform": [1]}
RNN: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["rnn.weight_hh_l0", "up"],
}
BOTH: dict[str, Any] = {
    "target_modules": [],
    "target_parameters": ["experts.up", "experts.down"],
}
HEAD: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
OLORA: dict[str, Any] = {"target_modules": ["c_proj"], "init_lora_weights": "olora"}
OUTPUT: dict[str, Any] = {"target_modules": ["out_proj"], "init_lora_weights": "pissa"}
ZEROS = {"linear.lora_magnitude_vector.weight": torch.zeros(8)}
CASES: list[
    tuple[Callable[[], nn.Module], dict[str, Any], Change, type[Exception], str]
] = [
    # what the configuration asks for
    (Mixed, {}, asks(peft_type="IA3"), FILE, "peft_type='IA3'"),
    (Mixed, {}, asks(lora_bias=True), FILE, "'lora_bias'"),
    (
        Mixed,
        {},
        asks(init_lora_weights="pissa_niter_4"),
        FILE,
        "'pissa_niter_4'.*cannot be computed again",
    ),
    (Mixed, {}, asks(lora_alpha="8"), FILE, "alpha='8'"),
    (Mixed, {}, asks(r=4), FILE, "has rank 2, but the configuration says 4"),
    (
        Mixed,
        {},
        lambda folder: (folder / PEFT_CONFIG).write_text("{"),
        FILE,
        r"adapter_config\.json",
    ),
    (
        Mixed,
        ROWS,
        asks(trainable_token_indices={"embed": [1, 99]}),
        MODEL,
        "2 rows of 'embed'.*up to 99. Resize it",
    ),
    (
        Mixed,
        ROWS,
        asks(trainable_token_indices={"embed": [-1, 4]}),
        MODEL,
        "2 rows of 'embed'",
    ),
    # what the tensors are
    (
        Mixed,
        {},
        holds({"head.lora_A.weight": torch.ones(2, 12)}),
        FILE,
        "only one of A and B of",
    ),
    (
        Mixed,
        {},
        holds({"linear.lora_diag": torch.ones(2)}),
        FILE,
        "'base_model.model.linear.lora_diag'",
    ),
    (Mixed, {}, holds({"w.lora_A.weight": torch.ones(2, 2)}), MODEL, "unexpected 'w'"),
    (
        Mixed,
        {},
        holds({"linear.lora_A.weight": torch.ones(2, 5)}),
        MODEL,
        r"factors \(2, 5\)",
    ),
    (
        Mixed,
        {},
        holds({"linear.lora_A.weight": torch.full((2, 8), torch.nan)}),
        FILE,
        "NaN",
    ),
    (
        Mixed,
        {},
        holds({"linear.base_layer.weight": torch.ones(8, 8)}),
        BASE,
        "differs from that",
    ),
    (
        Mixed,
        {},
        exchanges("linear.lora_B.weight", "linear.lora_A.weight"),
        FILE,
        "has rank 8, but .* says 2",
    ),
    (
        Mixed,
        {},
        exchanges("linear.lora_A.weight", "linear.lora_A.weight"),
        FILE,
        "not one name for each tensor",
    ),
    (
        Mixed,
        {},
        exchanges("linear.lora_A.weight", 3),
        FILE,
        r"safetensors \(lightning_lora_names\) has not one name",
    ),
    # what the model is
    (
        lambda: nn.ModuleDict({"linear": Scaled(4, 4)}),
        {},
        asks(),
        MODEL,
        "forward of its own",
    ),
    (
        Expert,
        BOTH,
        asks(target_parameters=["experts.up"]),
        MODEL,
        r"2 updates of 'experts'.*name \['up'\]",
    ),
    (TinyLM, HEAD, asks(), MODEL, "'lm_head.weight', which is tied to 'embed.weight'"),
    (Mixed, OLORA, asks(), MODEL, "'c_proj' is a Conv1D, trained"),
    (
        Attending,
        OUTPUT,
        asks(),
        MODEL,
        "'attn.out_proj' with init_lora_weights='pissa'.*never calls that layer",
    ),
    (
        Mixed,
        MORE,
        holds(ZEROS),
        MODEL,
        "'linear', which cannot be read: with use_dora, PEFT scales .* zero by zero",
    ),
    (
        Attending,
        {"target_modules": ["attn"]},
        with_magnitudes,
        FILE,
        "lora_magnitude_vector for 'attn.*, and PEFT has no DoRA",
    ),
    (
        Expert,
        BOTH,
        with_magnitudes,
        FILE,
        "lora_magnitude_vector for 'experts.base_layer', and PEFT has no DoRA",
    ),
]


@pytest.mark.parametrize(("make", "config", "change", "error", "match"), CASES)
def test_what_does_not_fit(
    tmp_path: Path, make: Any, config: Any, change: Change, error: Any, match: str
) -> None:
    written(tmp_path, make, **config)
    change(tmp_path)
    check_refused(tmp_path, built(make), error, match)


@pytest.mark.parametrize("value", [Path(), [1]], ids=["object", "list"])
def test_what_is_no_tensor(tmp_path: Path, value: Any) -> None:
    written(tmp_path, Mixed)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save(
        {**tensors, "base_model.model.linear.lora_A.weight": value},
        tmp_path / "adapter_model.bin",
    )
    check_refused(
        tmp_path, Mixed(), FILE, r"linear\.lora_A\.weight', which are no tensors"
    )


LACKING: list[tuple[Callable[[], nn.Module], dict[str, Any], Change, str]] = [
    (
        Mixed,
        {},
        lambda folder: (folder / PEFT_CONFIG).unlink(),
        "adapters of PEFT.*json, which is not there",
    ),
    (
        Mixed,
        {},
        lambda folder: (folder / WEIGHTS).unlink(),
        "as a folder it holds no adapters of PEFT",
    ),
    (Mixed, TWO, lacks("c_proj"), "'c_proj'"),
    (Mixed, MORE, lacks(r"c_proj\.lora_mag.*"), "use_dora=True.*'c_proj'"),
    (Mixed, MORE, asks(use_dora=False), "use_dora=False.*'c_proj', 'linear'"),
    (Mixed, MORE, lacks("head"), "names 'head' in"),
    (
        Mixed,
        MORE,
        lacks("embed"),
        "rows of 'embed' in .*remove them from trainable_token_indices",
    ),
    (Mixed, {}, asks(trainable_token_indices=[1]), "rows of an embedding in"),
    (Expert, RNN, lacks("rnn"), "names 'rnn' in"),
    (
        Blocks,
        {"target_modules": ["mlp.0", "mlp.2"]},
        lacks(r".*mlp\.2"),
        r"'m\.h\.0\.mlp\.2'",
    ),
    (
        Blocks,
        {**ONE, "bias": "all"},
        asks(layers_to_transform=None),
        r"names 'm\.h\.0\.q' in",
    ),
]


@pytest.mark.parametrize(("make", "config", "change", "match"), LACKING)
def test_a_file_that_lacks_what_its_configuration_names(
    tmp_path: Path, make: Any, config: Any, change: Change, match: str
) -> None:
    """PEFT takes start values for these, with a warning at most."""
    written(tmp_path, make, **config)
    change(tmp_path)
    check_refused(tmp_path, built(make), FILE, match)


def test_harmless_fields_are_ignored_and_missing_ones_are_those_of_peft(
    tmp_path: Path,
) -> None:
    expected = written(tmp_path, r=8)(INDEX)
    model = built(Mixed)
    # VeLoRA's, which changes training alone
    holds({"linear.lora_velora_embed": torch.ones(2)})(tmp_path)
    harmless = {
        "velora_config": {"scale": 2},
        "runtime_config": {"a": 1},
        "use_less": False,
    }
    config = {
        "peft_type": "LORA",
        "target_modules": ["linear"],
        **harmless,
        "author": "me",
        "note": "",
    }
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    with pytest.warns(
        ll.LoRAWarning, match="sets 'author', which PEFT .* does not know"
    ) as told:
        ll.load_adapter(model, tmp_path)
    assert gap(model(INDEX), expected) < 2e-6
    assert told[0].filename == __file__


def test_a_file_of_another_part_than_its_configuration_names(tmp_path: Path) -> None:
    """Such as that of an encoder, whose names are those of a decoder too."""
    written(tmp_path, Blocks, **ONE)
    asks(layers_to_transform=[0, 1])(tmp_path)
    with pytest.warns(
        ll.LoRAWarning, match=r"also names 'm\.h\.0\.q' in .*They stay as they are"
    ) as told:
        ll.load_adapter(built(Blocks), tmp_path)
    assert [warning.filename for warning in told] == [__file__]


SAME_LAYERS: list[dict[str, Any]] = [
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 1], "layers_pattern": ["h"]},
    {"layers_to_transform": [], "exclude_modules": ["h.0.q"]},
]


@pytest.mark.parametrize("fields", SAME_LAYERS)
def test_layers_that_the_configuration_leaves_out_are_not_missed(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    written(tmp_path, Blocks, **ONE)
    asks(**fields)(tmp_path)
    around = nn.ModuleDict(
        {"model": built(Blocks), "other": nn.ModuleDict({"q": nn.Linear(4, 4)})}
    )
    # what lies outside was not there
    with pytest.warns(ll.LoRAWarning, match="they begin with 'model'"):
        ll.load_adapter(around, tmp_path)


def test_names_that_fit_in_several_places(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"linear": nn.Linear(4, 4)})

    written(tmp_path, make)
    model = nn.ModuleDict({"a": make(), "b": make()})
    check_refused(
        tmp_path, model, ll.AdapterMismatchError, "below 'a', 'b'. Pass one of these"
    )
    with pytest.warns(
        ll.LoRAWarning, match=r"have no prefix; in ModuleDict they begin with 'x'"
    ):
        ll.load_adapter(nn.ModuleDict({"x": make()}), tmp_path)


def test_a_second_file_takes_the_place_of_the_first(tmp_path: Path) -> None:
    pissa: dict[str, Any] = {"target_modules": ["linear"], "init_lora_weights": "pissa"}
    written(tmp_path / "a", **pissa)
    b = f"{PRE}linear.lora_B.default.weight"
    other = write_peft(
        tmp_path / "b",
        built(Mixed),
        lambda peft: nn.init.ones_(peft.get_parameter(b)),
        **pissa,
    )
    model = built(Mixed)
    ll.load_adapter(model, tmp_path / "a")
    ll.merge_adapters(model)
    ll.load_adapter(model, tmp_path / "b")
    assert gap(model(INDEX), other(INDEX)) < 2e-6
    ll.merge_adapters(model)
    asks(r=4)(tmp_path / "b")
    check_refused(tmp_path / "b", model, ll.AdapterFileError, "rank")  # it stays merged
    model = built(Mixed)
    ll.inject_adapters(model, ll.LoRAConfig(target_modules=["linear"], r=2, alpha=8))
    check_refused(tmp_path / "a", model, ll.AdapterMismatchError, "init='pissa'")


def test_older_files_and_half_precision(tmp_path: Path) -> None:
    expected = written(tmp_path, modules_to_save=["norm"])(INDEX)
    tensors = load_file(tmp_path / WEIGHTS)
    old = tmp_path / "adapter_model.bin"
    (tmp_path / WEIGHTS).unlink()
    torch.save(tensors, old)
    for path in (tmp_path, old):
        model = built(Mixed)
        ll.load_adapter(model, path)
        assert gap(model(INDEX), expected) < 2e-6
    torch.save({name: value.bfloat16() for name, value in tensors.items()}, old)
    model = built(Mixed)
    ll.load_adapter(model, old)
    a = model.get_parameter("linear.lora_A")
    assert a.dtype == torch.float32
    assert torch.equal(a, tensors[f"{PRE}linear.lora_A.weight"].bfloat16().float())


@pytest.mark.parametrize("end", ["vector", "vector.weight"])
def test_both_spellings_of_the_magnitude(tmp_path: Path, end: str) -> None:
    expected = written(tmp_path, use_dora=True)(INDEX)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    save_file(
        {
            re.sub(r"vector(\.weight)?$", end, name): value
            for name, value in tensors.items()
        },
        path,
    )
    model = built(Mixed)
    ll.load_adapter(model, tmp_path)
    assert gap(model(INDEX), expected) < 2e-6


def test_single_tensors_of_the_base_train(tmp_path: Path) -> None:
    written(tmp_path)
    holds({"norm.weight": torch.full((12,), 2.0)})(tmp_path)
    model = built(Mixed)
    ll.load_adapter(model, tmp_path)
    assert model.get_parameter("norm.weight").eq(2).all()
    assert model.get_parameter("norm.weight").requires_grad
    assert not model.get_parameter("norm.bias").requires_grad
    save_file({f"{PRE}head.weight": torch.ones(3, 12)}, tmp_path / WEIGHTS)
    check_refused(
        tmp_path, built(Mixed), ll.AdapterFileError, "no adapters of this package"
    )


def in_a_pickle(make: Callable[[Tensor], Tensor]) -> Change:
    """Let each B be another kind of tensor, which safetensors may not have."""

    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        odd = {
            name: make(value) if "lora_B" in name else value
            for name, value in held.items()
        }
        (folder / WEIGHTS).unlink()
        torch.save(odd, folder / "adapter_model.bin")

    return change


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "sparse": Tensor.to_sparse,
    "sparse rows": Tensor.to_sparse_csr,
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "without values": lambda value: value.to("meta"),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|quantize|TypedStorage)")
@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_tensors_with_which_torch_cannot_compute_are_named(
    tmp_path: Path, make: Callable[[Tensor], Tensor]
) -> None:
    written(tmp_path)
    in_a_pickle(make)(tmp_path)
    check_refused(
        tmp_path,
        built(Mixed),
        ll.AdapterFileError,
        r"lora_B.*with which nothing can be computed.*\.float\(\)",
    )
    a = torch.ones(2, 8)
    b = make(torch.ones(8, 2))
    file = tmp_path / "loralib.pt"
    torch.save({"model_state_dict": {"linear.lora_A": a, "linear.lora_B": b}}, file)
    model = built(Mixed)
    with refused(model, ll.AdapterFileError, r"'linear.lora_B'.*\.float\(\)"):
        ll.load_adapter(model, file, alpha=2)


def test_an_update_that_was_rounded_to_integers_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    in_a_pickle(lambda value: value.to(torch.int8))(tmp_path)
    check_refused(
        tmp_path,
        built(Mixed),
        ll.AdapterFileError,
        r"'linear' in torch\.int8: .*\.float\(\)",
    )
