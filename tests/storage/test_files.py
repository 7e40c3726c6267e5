"""Adapters in files: what is in them, what they fit, and that nothing is written before everything is checked."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterStateError,
    BaseMismatchError,
    LoRAConfig,
    LoRAError,
    LoRAWarning,
    adapter_state_dict,
    inject_adapters,
    load_adapter,
    load_adapter_state_dict,
    merge_adapters,
    remove_adapters,
    save_adapter,
    unmerge_adapters,
)
from lightning_lora.layers import LoRALayer
from tests.models import LitTiny, TinyLM, data, lora, randomise, same, state, trainer, unties

CONFIG = LoRAConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["head"], bias="lora_only")
X = torch.arange(20)


def trained() -> LitTiny:
    """A model with every kind of thing that training changes."""
    model = LitTiny()
    inject_adapters(model, CONFIG)
    randomise(model)
    with torch.no_grad():
        model.head.weight.add_(1)
        model.q_proj.bias.add_(1)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_adapter(trained(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def test_file_restores_the_trained_model_on_a_plain_base(file: Path) -> None:
    model = LitTiny()
    load_adapter(model, file)
    assert same(state(model), state(trained()))
    load_adapter(model, file)
    assert torch.equal(model(X), trained()(X))


def test_state_holds_what_training_changed_and_nothing_else() -> None:
    assert set(adapter_state_dict(trained())) == {
        "q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B", "q_proj.bias", "head.weight", "head.bias",
    }  # fmt: skip


def test_file_is_adapter_sized_and_plain(file: Path) -> None:
    values = sum(value.nbytes for value in adapter_state_dict(trained()).values())
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["lightning_lora"])
    assert file.stat().st_size < values + 4096
    assert about["format"] == 2 and LoRAConfig.from_dict(about["config"]) == CONFIG
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode  # as any file: others may read it


def test_state_is_the_same_merged_and_unmerged(file: Path) -> None:
    model = trained()
    before = adapter_state_dict(model)
    merge_adapters(model)
    assert same(adapter_state_dict(model), before)
    save_adapter(model, file)
    again = LitTiny()
    load_adapter(again, file)
    assert same(state(again), state(trained()))


def test_loading_into_a_merged_model_replaces_its_update(file: Path) -> None:
    model = LitTiny()
    inject_adapters(model, CONFIG)
    randomise(model, seed=5)
    merge_adapters(model)
    load_adapter(model, file)
    torch.testing.assert_close(model(X), trained()(X))
    unmerge_adapters(model)
    assert same(state(model), state(trained()))


def test_buffers_that_changed_are_stored_and_others_are_restored(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))

    model = build()
    inject_adapters(model, LoRAConfig(r=1))
    fresh = adapter_state_dict(model)
    assert set(fresh) == {"0.lora_A", "0.lora_B"}
    fresh = {name: value.clone() for name, value in fresh.items()}
    for buffer in model[1].buffers():
        buffer.add_(1)
    assert set(adapter_state_dict(model)) - set(fresh) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    save_adapter(model, tmp_path / "a.safetensors")
    again = build()
    load_adapter(again, tmp_path / "a.safetensors")
    assert same(state(again), state(model))
    load_adapter_state_dict(again, fresh)
    assert torch.equal(again[1].running_mean, torch.zeros(3)) and set(adapter_state_dict(again)) == set(fresh)


def test_tied_head_trained_whole_is_stored_once_per_name_and_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = TinyLM()
    model = copy.deepcopy(base)
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(base, tmp_path / "a.safetensors")
    assert base.lm_head.weight is base.embed.weight and torch.equal(base(X), model(X))


@unties
def test_merging_a_tied_head_leaves_the_embedding_alone() -> None:
    torch.manual_seed(0)
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["lm_head"]))
    randomise(model)
    adapted, embedding = model(X), model.embed.weight.detach().clone()
    merge_adapters(model)
    torch.testing.assert_close(model(X), adapted)
    assert torch.equal(model.embed.weight, embedding)
    unmerge_adapters(model)
    assert model.lm_head.weight is model.embed.weight


def test_adapters_need_their_own_base(file: Path) -> None:
    for change in (0, -1):
        model = LitTiny()
        with torch.no_grad():
            model.q_proj.weight.view(-1)[change] += 1e-6  # one element, hardly
        with refused(model, BaseMismatchError, "q_proj.weight"):
            load_adapter(model, file)
    with refused(
        model := LitTiny(width=6), BaseMismatchError, r"another architecture.* is \(4, 8\) there and \(4, 6\) here"
    ):
        load_adapter(model, file)
    with refused(model := LitTiny().double(), BaseMismatchError, "float32.*float64"):
        load_adapter(model, file)


def test_a_merged_model_is_another_base(file: Path) -> None:
    model = LitTiny()
    load_adapter(model, file)
    merge_adapters(model)
    remove_adapters(model)
    with refused(model, BaseMismatchError, "merged"):
        load_adapter(model, file)


@contextmanager
def refused(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
    """Expect an error, and the model exactly as it was."""

    def kinds() -> list[Any]:
        return [(type(module), module.training) for module in model.modules()] + [
            p.requires_grad for p in model.parameters()
        ]

    before, kinds_before = state(model), kinds()
    with pytest.raises(error, match=match):
        yield
    assert same(state(model), before) and kinds() == kinds_before


def test_arguments_the_wrong_way_round_are_told(file: Path) -> None:
    for call in (load_adapter, save_adapter):
        with pytest.raises(AdapterFileError, match="a LitTiny was given"):
            call(file, LitTiny())  # type: ignore[arg-type]


STATE_CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda s: s.pop("q_proj.lora_A"), "missing 'q_proj.lora_A'"),
    "missing whole module": (lambda s: s.pop("head.bias"), "missing 'head.bias'"),
    "unexpected": (lambda s: s.update({"k_proj.lora_A": torch.zeros(1)}), "unexpected 'k_proj.lora_A'"),
    "base weight": (lambda s: s.update({"embed.weight": torch.zeros(20, 8)}), "unexpected 'embed.weight'"),
    "renamed": (
        lambda s: s.update({"q_proj.lora_a": s.pop("q_proj.lora_A")}),
        "missing 'q_proj.lora_A' and unexpected 'q_proj.lora_a'",
    ),
    "shape": (lambda s: s.update({"q_proj.lora_A": torch.zeros(3, 8)}), r"\(3, 8\).*\(2, 8\)"),
    "transposed": (lambda s: s.update({"v_proj.lora_B": torch.zeros(2, 8)}), r"\(2, 8\).*\(8, 2\)"),
    "kind": (lambda s: s.update({"q_proj.lora_A": torch.zeros(2, 8, dtype=torch.int64)}), "int64"),
    "no values": (lambda s: s.update({"v_proj.lora_B": torch.zeros(8, 2, device="meta")}), "no values"),
    "no tensor": (lambda s: s.update({"q_proj.lora_A": "A"}), "str"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(("change", "message"), STATE_CHANGES.values(), ids=STATE_CHANGES)
def test_state_that_does_not_fit_is_refused_and_nothing_is_written(change: Any, message: str) -> None:
    bad = dict(adapter_state_dict(trained()))
    change(bad)
    model = LitTiny()
    inject_adapters(model, CONFIG)
    with refused(model, AdapterMismatchError, message):
        load_adapter_state_dict(model, bad)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Write a file again with another description or other tensors."""
    with safe_open(path, "pt") as opened:
        about = json.loads(opened.metadata()["lightning_lora"])
    tensors = load_file(path)
    change(about, tensors)
    save_file(tensors, path, {"lightning_lora": json.dumps(about)})


def flip(content: bytes, at: int) -> bytes:
    return bytes(byte ^ (index == at % len(content)) for index, byte in enumerate(content))


def swap(tensors: dict[str, Tensor], a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def relabel(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].view(torch.int32)


TAMPERED: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "bit flipped": lambda path: path.write_bytes(flip(path.read_bytes(), -5)),
    "text": lambda path: path.write_text("hello"),
    "foreign safetensors": lambda path: save_file({"a": torch.zeros(1)}, path),
    "foreign torch file": lambda path: torch.save({"a": torch.zeros(1)}, path),
    "foreign object": lambda path: torch.save([1, 2], path),
    "full checkpoint": lambda path: torch.save({"state_dict": LitTiny().state_dict()}, path),
    "description of another kind": lambda path: save_file(load_file(path), path, {"lightning_lora": "[]"}),
    "description not JSON": lambda path: save_file(load_file(path), path, {"lightning_lora": "{"}),
    "newer format": lambda path: rewrite(path, lambda about, _: about.update(format=9)),
    "unknown option": lambda path: rewrite(path, lambda about, _: about["config"].update(rank=2)),
    "impossible option": lambda path: rewrite(path, lambda about, _: about["config"].update(r=0)),
    "another dtype": lambda path: rewrite(path, lambda _, tensors: relabel(tensors, "q_proj.lora_A")),
    "renamed tensors": lambda path: rewrite(path, lambda _, tensors: swap(tensors, "q_proj.lora_A", "v_proj.lora_A")),
    "another alpha": lambda path: rewrite(path, lambda about, _: about["config"].update(alpha=8)),
    "no fingerprint": lambda path: rewrite(path, lambda about, _: about.update(base=[])),
    "broken fingerprint": lambda path: rewrite(path, lambda about, _: about.update(base=[1])),
}  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_tampered_file_is_refused_and_the_model_is_as_it_was(file: Path, tamper: Callable[[Path], Any]) -> None:
    tamper(file)
    plain, adapted = LitTiny(), trained()
    with refused(plain, AdapterFileError, "."):
        load_adapter(plain, file)
    with refused(adapted, AdapterFileError, "."):
        load_adapter(adapted, file)


@pytest.mark.parametrize(
    "option", [{"alpha": 8.0}, {"use_rslora": True}, {"r": 4}, {"alpha_pattern": {"q_proj": 9.0}}], ids=str
)
def test_adapters_of_another_function_are_refused_with_the_arguments_to_use(file: Path, option: dict[str, Any]) -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(**(CONFIG.to_dict() | option)))
    with refused(model, AdapterMismatchError, "r=2, alpha=4, use_rslora=False"):
        load_adapter(model, file)


def test_file_says_the_base_that_lies_under_the_adapters_now(tmp_path: Path) -> None:
    model, other = trained(), LitTiny()
    with torch.no_grad():
        other.embed.weight.add_(1)
    save_adapter(model, tmp_path / "before.safetensors")
    with pytest.warns(LoRAWarning, match="its adapters stay as they are"):
        model.load_state_dict(other.state_dict())
    save_adapter(model, tmp_path / "after.safetensors")
    load_adapter(other, tmp_path / "after.safetensors")
    with pytest.raises(BaseMismatchError):
        load_adapter(LitTiny(), tmp_path / "after.safetensors")


def test_file_loads_where_adapters_were_injected_in_a_part(file: Path) -> None:
    model = nn.ModuleDict({"net": LitTiny()})
    inject_adapters(model, CONFIG)
    randomise(model)
    save_adapter(model, file)
    again = nn.ModuleDict({"net": LitTiny()})
    inject_adapters(again["net"], CONFIG)
    load_adapter(again, file)
    assert same(adapter_state_dict(again), adapter_state_dict(model))


def test_odd_buffers_are_stored_and_restored(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("expanded", torch.ones(1).expand(4))
            self.register_buffer("nan", torch.tensor([float("nan")]))
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("count", torch.tensor(0))

    torch.manual_seed(0)
    model = Odd()
    inject_adapters(model, LoRAConfig(r=1))
    assert set(adapter_state_dict(model)) == {"linear.lora_A", "linear.lora_B"}
    fresh = copy.deepcopy(adapter_state_dict(model))
    model.count += 1
    assert set(adapter_state_dict(model)) - set(fresh) == {"count"}
    load_adapter_state_dict(model, fresh)
    assert model.count == 0
    save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    load_adapter(Odd(), tmp_path / "a.safetensors")
    remove_adapters(model)


def test_head_replaced_after_injection_is_the_one_that_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    config = LoRAConfig(r=1, modules_to_save=["1"])
    inject_adapters(model, config)
    model[1] = nn.Linear(4, 3)
    inject_adapters(model, config)
    remove_adapters(model)
    assert model(torch.zeros(4)).shape == (3,)


def test_missing_file_and_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_adapter(LitTiny(), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"The folder .*none does not exist"):
        save_adapter(trained(), tmp_path / "none" / "adapter.safetensors")
    with pytest.raises(AdapterFileError, match="folder"):
        load_adapter(LitTiny(), tmp_path)


@pytest.mark.parametrize(
    "call",
    [adapter_state_dict, merge_adapters, unmerge_adapters, remove_adapters, lambda m: load_adapter_state_dict(m, {})],
)
def test_calls_on_a_plain_model_say_what_to_do(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(AdapterStateError, match="inject_adapters"):
        call(LitTiny())
    outer = nn.Sequential(trained())
    with pytest.raises(LoRAError, match="'0': pass that module"):
        call(outer)


def test_gpt3_adapter_file_is_the_papers_35_mb(tmp_path: Path) -> None:
    """Hu et al. 2021, section 4.2: r=4 on W_q and W_v of 96 layers, in fp16: 37.8 million bytes, 36 MiB."""
    with torch.device("meta"):
        layers = ({name: nn.Linear(12288, 12288, bias=False) for name in "qv"} for _ in range(96))
        model = nn.Sequential(*map(nn.ModuleDict, layers)).half()
    inject_adapters(model, LoRAConfig(r=4, target_modules=["q", "v"], autocast_adapter_dtype=False))
    with pytest.raises(AdapterStateError, match="meta"):
        save_adapter(model, tmp_path / "gpt3.safetensors")
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, factor in layer.lora_parameters().items():
                setattr(layer, name, nn.Parameter(torch.zeros_like(factor, device="cpu")))
    save_adapter(model, tmp_path / "gpt3.safetensors")
    assert (tmp_path / "gpt3.safetensors").stat().st_size == pytest.approx(37.8e6, rel=0.002)


def test_failed_load_leaves_adapters_that_a_part_has(file: Path) -> None:
    model, other = (nn.ModuleDict({"net": LitTiny(), "rest": nn.Linear(2, 2)}) for _ in range(2))
    inject_adapters(model, CONFIG)
    save_adapter(model, file)
    inject_adapters(other["net"], CONFIG)  # whose rest is another
    flags = [p.requires_grad for p in other.parameters()]
    with pytest.raises(BaseMismatchError):
        load_adapter(other, file)
    assert flags == [p.requires_grad for p in other.parameters()] and adapter_state_dict(other["net"])


def test_what_trains_is_stored_whatever_the_model_leaves_out_of_its_state(tmp_path: Path) -> None:
    class Slim(LitTiny):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "head" in name}

    model = Slim()
    inject_adapters(model, CONFIG)
    randomise(model)
    save_adapter(model, tmp_path / "a.safetensors")
    again = LitTiny()
    load_adapter(again, tmp_path / "a.safetensors")
    assert torch.equal(again(torch.arange(20)), model(torch.arange(20)))


def test_statistics_of_a_diverged_run_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    base = copy.deepcopy(model)
    inject_adapters(model, LoRAConfig(r=1, modules_to_save=["1"]))
    model[1].running_mean.fill_(torch.nan)
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"'1.running_mean' hold NaN"):
        load_adapter(base, tmp_path / "a.safetensors")


def test_norms_of_a_base_loaded_with_its_adapters_are_the_bases() -> None:
    model, again = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    for buffer in model[1].buffers():
        buffer.add_(2)
    for each in (model, again):
        inject_adapters(each, LoRAConfig(r=1))
    randomise(model)
    again.load_state_dict(model.state_dict())
    remove_adapters(again)
    remove_adapters(model)
    assert same(state(again), state(model))


def test_a_link_is_written_through_and_what_is_no_file_stays(tmp_path: Path) -> None:
    model = trained()
    (tmp_path / "link").symlink_to(tmp_path / "a.safetensors")
    save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.safetensors").is_file()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterFileError, match="is not a file"):
        save_adapter(model, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_home_folder_and_long_names_are_what_they_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    fit = trainer(tmp_path, [lora(merge=False)], enable_checkpointing=False)
    fit.fit(model := LitTiny(), data())
    for name in ("a.ckpt", "v" * 250 + ".ckpt"):
        fit.save_checkpoint(f"~/{name}")
    save_adapter(model, "~/a.safetensors")
    names = {"a.ckpt", "v" * 250 + ".ckpt", "a.safetensors"}
    assert {path.name for path in (tmp_path / "home").iterdir()} == names
    for name in names:
        load_adapter(again := LitTiny(), f"~/{name}")
        assert same(state(again), state(model))
    trainer(tmp_path, [lora(merge=False)], enable_checkpointing=False).fit(LitTiny(), data(), ckpt_path="~/a.ckpt")


def test_what_is_written_can_be_read_however_many_names_it_has(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        names = [f"an_expert_with_a_name_that_has_many_{i:03d}_characters" for i in range(100)]
        return nn.ModuleDict({outer: nn.ModuleDict({n: nn.Linear(1, 1) for n in names}) for outer in names[:70]})

    model = build()
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inject_adapters(model, LoRAConfig(r=1, target_modules=targets))
    assert sum(map(len, targets)) > 700_000
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(build(), tmp_path / "a.safetensors")


def test_infinities_of_the_base_are_no_sign_of_a_diverged_run(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.mask = nn.Linear(4, 4), nn.Parameter(torch.tensor([0, 0, 0, -torch.inf]))

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Masked())

    model = build()
    inject_adapters(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(again := build(), tmp_path / "a.safetensors")
    assert same(state(again), state(model))
    with torch.no_grad():
        model[1].mask[0] = torch.inf
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"'1\.mask' hold NaN or infinite"):
        load_adapter(build(), tmp_path / "a.safetensors")


def test_part_that_will_not_load_its_own_state_leaves_the_rest_as_it_was() -> None:
    class Versioned(nn.Module):
        version = 1

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            if state["version"] != self.version:
                raise ValueError("another version")

    model = nn.Sequential(nn.Linear(4, 4), Versioned(), nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    trained, before = adapter_state_dict(model), state(nn.Sequential(model[0], nn.Identity(), model[2]))
    trained = {name: v + 1 if isinstance(v, Tensor) else v for name, v in trained.items()}
    model[1].version = 2
    with pytest.raises(ValueError, match="another version"):
        load_adapter_state_dict(model, trained)
    assert same(state(nn.Sequential(model[0], nn.Identity(), model[2])), before)


def test_buffers_that_grew_or_are_views_are_given_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    model[1].register_buffer("bank", torch.zeros(0, 4))
    model[1].register_buffer("waves", torch.fft.fft(torch.arange(4.0)).conj())
    inject_adapters(model, LoRAConfig(r=2))
    assert "1.waves" not in adapter_state_dict(model)
    model[1].bank = torch.ones(3, 4)
    remove_adapters(model)
    assert model[1].bank.shape == (0, 4) and not isinstance(model[0], LoRALayer)
