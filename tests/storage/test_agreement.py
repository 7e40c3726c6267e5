"""The configuration of a file, its list of layers and its tensors agree, and nothing in it takes for ever."""

import copy
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from lightning_lora.storage.schema import slow_expressions
from tests.support.faults import frugal
from tests.support.models import LitTiny, lora
from tests.support.storage import fitted, goes_on, refused, rewrite, saved

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize)", "ignore:.*fork:DeprecationWarning")


def square() -> Any:
    """Square layers, so that no shape says what they are."""
    torch.manual_seed(1)
    return nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a" * 40, "q_proj")})


Q, LONG = "q_proj", "a" * 40


def written(path: Path, **config: Any) -> Path:
    saved(path, square(), **{"r": 2, "alpha": 3, **config})
    return path


def config(**fields: Any) -> Callable[..., object]:
    return lambda about, _: about["config"].update(fields)


def layers(**fields: Any) -> Callable[..., object]:
    return lambda about, _: [layer.update(fields) for layer in about["layers"]]


def parts(**fields: Any) -> Callable[..., object]:
    return lambda about, _: [part.update(fields) for layer in about["layers"] for part in layer["parts"]]


def put(value: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    return lambda _, tensors: tensors.update({f"{Q}.lora_A": value(tensors[f"{Q}.lora_A"])})


CONTRADICTIONS: dict[str, tuple[dict[str, Any], Callable[..., object]]] = {
    "config.alpha": ({}, config(alpha=8.0)),
    "config.r": ({}, config(r=1)),
    "config.use_rslora": ({}, config(use_rslora=True)),
    "config.alpha_pattern": ({}, config(alpha_pattern={Q: 20.0})),
    "config.rank_pattern": ({}, config(rank_pattern={Q: 1})),
    "config.init of others": ({}, config(init="pissa")),
    "config.init": ({"init": "pissa"}, config(init="kaiming")),
    "config.use_dora": ({"use_dora": True}, config(use_dora=False)),
    "scaling": ({}, layers(scaling=4.0)),
    "infinite scaling": ({}, layers(scaling=float("inf"))),
    "scaling that is no number": ({}, layers(scaling=float("nan"))),
    "r": ({}, layers(r=1)),
    "a rank of 0": ({}, layers(r=0)),
    "a rank of 0, and slow": ({}, lambda about, _: (layers(r=0)(about, _), config(exclude_modules="(a+)+b")(about, _))),
    "a matrix's scaling": ({}, parts(scaling=3.0)),
    "a matrix's r": ({}, parts(r=1)),
    "a layer is missing": ({}, lambda about, _: about["layers"].pop()),
    "a layer has another name": ({}, lambda about, _: about["layers"][0].update(name="other")),
    "a layer is there twice": ({}, lambda about, _: about["layers"].append({**about["layers"][0], "scaling": 5.0})),
    "a tensor is missing": ({}, lambda _, tensors: tensors.pop(f"{Q}.lora_B")),
    "a tensor of another shape": ({}, put(lambda value: value[0, :3].clone())),
    "a tensor of another rank": ({}, put(lambda value: value[:1].clone())),
    "integers": ({}, put(lambda value: value.int())),
    "complex numbers": ({}, put(lambda value: value.to(torch.complex64))),
    "8 bits": ({}, put(lambda value: value.to(torch.float8_e4m3fn))),
}


@pytest.mark.parametrize(("made", "change"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_by_every_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: dict[str, Any], change: Any
) -> None:
    path, model = rewrite(written(tmp_path / "a.safetensors", **made), change), square()
    with refused(model, ll.AdapterFileError, "does not agree|did not write|cannot be used"):
        ll.load_adapter(model, path)
    for command in (["inspect"], ["combine", "--out", "c.safetensors", str(path)]):
        assert main([*command, str(path)]) == 1
        assert re.search("does not agree|did not write|cannot be used", capsys.readouterr().err)


OTHER_LAYERS = {
    "kind": layers(kind="LoRAConv1D"),
    "rows": parts(first=4, rows=12),
    "weight": lambda about, _: [
        (layer["parts"][0].update(weight="bias"), layer["shapes"].update(bias=layer["shapes"].pop("weight")))
        for layer in about["layers"]
    ],
}


@pytest.mark.parametrize("change", OTHER_LAYERS.values(), ids=OTHER_LAYERS)
def test_layers_that_are_described_as_others_are_refused(tmp_path: Path, change: Any) -> None:
    path, model = rewrite(written(tmp_path / "a.safetensors"), change), square()
    with refused(model, ll.AdapterMismatchError, "other rows of its weight are adapted"):
        ll.load_adapter(model, path)


# Expressions

FOREVER = r"(a+)+b"

EXPRESSIONS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": rf"{FOREVER}|.*"},
    "exclude_modules": {"exclude_modules": FOREVER},
    "rank_pattern": {"rank_pattern": {FOREVER: 1}},
    "alpha_pattern": {"alpha_pattern": {FOREVER: 1.0}},
    "target_slices": {"target_slices": {FOREVER: {"q": [0, 2]}}},
    "choices": {"rank_pattern": {"(a|aa)*b": 1}},
    "many repeats": {"rank_pattern": {".*" * 12 + "b": 1}},
    "many options": {"rank_pattern": {"a?" * 40 + "a" * 40 + "b": 1}},
    "long": {"target_modules": "|".join(map(str, range(900_000)))},
}


@pytest.mark.processes
@pytest.mark.parametrize("fields", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_expressions_of_a_file_never_take_for_ever(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = written(tmp_path / "a.safetensors", rank_pattern={Q: 1}, alpha_pattern={LONG: 5})
    before = square()
    ll.load_adapter(before, path)
    rewrite(path, config(**fields))

    def work() -> None:
        ll.load_adapter(model := square(), path)
        assert all(torch.equal(model[name](torch.ones(8)), before[name](torch.ones(8))) for name in model)
        assert main(["inspect", str(path)]) == 0

    frugal(work, seconds=30)


@pytest.mark.parametrize("argument", ["rank_pattern", "alpha_pattern"])
def test_such_expressions_beside_a_file_of_peft_are_refused(tmp_path: Path, argument: str) -> None:
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, argument: {FOREVER: 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    tensors = {f"base_model.model.{LONG}.lora_A.weight": torch.ones(2, 8)}
    tensors[f"base_model.model.{LONG}.lora_B.weight"] = torch.ones(8, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with refused(model := square(), ll.AdapterFileError, "may take for ever: .* Name the layers"):
        ll.load_adapter(model, tmp_path)


def test_an_honest_expression_with_repeats_still_loads(tmp_path: Path) -> None:
    expression, model = r"(\w+\.)*q_proj", LitTiny()
    fitted(tmp_path / "a.ckpt", model, lora(target_modules=expression, merge=False))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        ll.load_adapter(again := LitTiny(), tmp_path / name)
        assert torch.equal(again.q_proj.lora_A, model.q_proj.lora_A) and not hasattr(again.v_proj, "lora_A")
    goes_on(tmp_path / "a.ckpt", callback=lora(target_modules=expression, merge=False))


WORDS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense", "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
UNSLOTH = (
    rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{WORDS[0]}).*?(?:{WORDS[1]}).*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{WORDS[0]})\.(?:(?:{WORDS[1]})))"
)
"""As unsloth writes it."""


@pytest.mark.parametrize(
    ("expression", "slow"),
    [
        (r".*\.layers\.(1|2)\..*(q|v)_proj", False),
        (r"(?:.*\.)?self_attn\.[qkv]_proj", False),
        (r"model\.layers\.\d{1,2}\.(?!mlp).*", False),
        ("|".join(f"model.layers.{i}.q" for i in range(999)), False),
        (r"[)(*+]+\)*\\+", False),
        ("[]*]*[^]+]+", False),
        (UNSLOTH, False),
        (r"(x(ab)*)*", True),
        (r"(aa|ab)*c", True),
        ((".*" * 5 + "a|") * 999, True),
        ("(x?a|a)" * 40, True),
        (r"(a?){30}b", True),
        (".?" * 30 + "b", True),
        ("(a|[a])" * 30 + "b", True),
        (r"(?:a|aa)+b", True),
        (r"(?x)(a+ # )\n)+b", True),
        (r"(?P<x>a+)+b", True),
        ("(a|a)" * 40, True),
        ("[" * 10_000, True),
        ("(", True),
        (")", True),
    ],
)
def test_which_expressions_are_slow(expression: str, slow: bool) -> None:
    assert bool(slow_expressions({"target_modules": expression})) is slow


def test_many_expressions_are_slow_together() -> None:
    keys = [f".*.*.*.*{i:05}" for i in range(1000)]
    assert slow_expressions({"rank_pattern": dict.fromkeys(keys, 2)})
    assert not slow_expressions({"rank_pattern": dict.fromkeys(keys[:99], 2)})


class Gate(nn.Module):
    """A model's own parameters and buffers may be called as an adapter's are."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.lora_A = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.lora_B_bias = nn.Parameter(torch.zeros(8))
        self.register_buffer("lora_magnitude", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x * self.lora_A) * self.lora_magnitude + self.lora_B_bias


def test_names_of_a_model_that_are_like_an_adapters_are_its_own(tmp_path: Path) -> None:
    model = nn.Sequential(Gate())
    untrained = copy.deepcopy(model)
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["0.lora_A"], "bias": "all"}
    ll.inject_adapters(model, ll.LoRAConfig(r=2, **settings))
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value += 0.1 * (value.requires_grad or value is model[0].lora_magnitude)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(untrained, tmp_path / "a.safetensors")
    assert torch.equal(untrained(x := torch.randn(2, 8)), model(x))


# Tensors of other libraries


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda value: value.to_sparse(),
    "compressed rows": lambda value: value.to_sparse_csr(),
    "nested": lambda value: torch.nested.nested_tensor(list(value)),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "8 bits": lambda value: value.to(torch.float8_e4m3fn),
    "repeated": lambda value: torch.zeros(1).expand(1 << 34, 8),
    "meta": lambda value: value.to("meta"),
}
if Version(torch.__version__) >= Version("2.15"):
    del ODD["nested"]  # torch.load reads none of them


@pytest.mark.processes
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_tensors_of_other_libraries_are_refused(tmp_path: Path, make: Callable[[Tensor], Tensor]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    a, b, weight, peft = torch.ones(2, 8), torch.ones(8, 2), torch.ones(8, 8), f"base_model.model.{Q}"
    good = {f"{peft}.lora_A.weight": a, f"{peft}.lora_B.weight": b, f"{peft}.base_layer.weight": weight}
    files = [(good, {}), ({f"{Q}.lora_A": a, f"{Q}.lora_B": b, f"{Q}.weight": weight}, {"alpha": 2})]
    files.append(({"model_state_dict": files[1][0]}, {"alpha": 2}))

    def work() -> None:
        for tensors, options in files:
            held = tensors.get("model_state_dict", tensors)
            for name in held:
                changed = {**held, name: make(held[name])}
                torch.save({"model_state_dict": changed} if held is not tensors else changed, tmp_path / "a.bin")
                with refused(model := square(), ll.AdapterFileError, "no plain tensors"):
                    ll.load_adapter(model, tmp_path / "a.bin", **options)

    frugal(work)


# What cannot be computed with


@pytest.mark.parametrize("value", [3e38, 1e30, 1e11])
def test_huge_values_end_every_command_in_one_sentence(tmp_path: Path, capsys: Any, value: float) -> None:
    path = rewrite(written(tmp_path / "a.safetensors"), put(lambda a: torch.full_like(a, value)))
    for command in (["inspect", "--json"], ["combine", "--out", "c.safetensors", str(path)]):
        assert main([*command, str(path)]) == 1
        assert "hold NaN or infinite values, or some above 1e+10" in capsys.readouterr().err


@pytest.mark.processes
def test_an_archive_without_its_end_is_not_read(tmp_path: Path) -> None:
    """torch finds the records of such a file, and would take a gigabyte for one of them."""
    small = io.BytesIO()
    torch.save({f"{Q}.lora_A": torch.zeros(1), f"{Q}.lora_B": torch.zeros(1)}, small)
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if not name.endswith("/data/0"):
                new.writestr(name, old.read(name))
                continue
            with new.open(name, "w", force_zip64=True) as record:
                for _ in range(1 << 10):
                    record.write(bytes(1 << 20))
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"PK\5\6" + bytes(14))

    def work() -> None:
        with refused(model := square(), ll.AdapterFileError, "is damaged: its end"):
            ll.load_adapter(model, tmp_path / "a.bin", alpha=1)

    frugal(work)
