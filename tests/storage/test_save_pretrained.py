"""save_pretrained, whoever calls it, writes what an adapted model computes."""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lightning_lora as ll
from tests.storage.test_merged_files import merged
from tests.support.compared import assert_all_refused, assert_holds, assert_same_tensors
from tests.support.faults import unchanged
from tests.support.models import (
    Around,
    X,
    as_trained,
    data,
    randomise,
    same,
    state,
    trainer,
)
from tests.support.parameters import nan_at, trainable
from tests.support.storage import refused

says = pytest.warns(
    ll.LoRAWarning,
    match=r"writes merged weights.* save_adapter\(model, path\), or export_peft",
)
quiet = pytest.mark.filterwarnings(
    "ignore:.*writes merged weights:lightning_lora.LoRAWarning"
)


class LitGPT2(Around):
    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = GPT2Config(
                vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2
            )
            super().__init__(GPT2LMHeadModel(config).eval())

    def forward(self, index: Tensor) -> Any:
        return self.model(index[None]).logits


def adapted(model: Any = None, **config: Any) -> Any:
    return as_trained(
        model or LitGPT2(), **{"target_modules": ["c_attn", "c_proj"]} | config
    )


@torch.no_grad()
def output(model: Any) -> Tensor:
    return model.eval()(X[None, :8]).logits


def check(folder: Path, model: Any) -> None:
    """The folder gives a model that computes the same, with nothing missing and nothing left over."""
    again, about = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(about.values())
    torch.testing.assert_close(output(again), output(model))
    assert again.config.architectures == ["GPT2LMHeadModel"]


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "modules": {"modules_to_save": ["ln_f", "ln_1"], "bias": "all"},
    "rows": {"trainable_token_indices": [2, 5]},
    "parameters": {
        "target_modules": [],
        "target_parameters": ["c_fc.weight", "wpe.weight"],
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_save_pretrained_writes_what_an_adapted_model_computes(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    lit = adapted(**config)
    for p in trainable(lit):
        p.data.add_(0.1)
    with says as said, unchanged(lit):
        lit.model.save_pretrained(tmp_path)
    assert len(said) == 1
    assert said[0].filename == __file__
    check(tmp_path, lit.model)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """What each module has of its own that writes it."""
    found = {}
    for name, module in model.named_modules():
        found[name] = vars(module).keys() & {"save_pretrained", "state_dict"}
    return found


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_plain_model_writes_by_itself_again(tmp_path: Path, is_merged: bool) -> None:
    lit = LitGPT2()
    lit.save_pretrained = print  # the user's own
    before = attributes(lit)
    assert attributes(adapted(lit)) != before
    if is_merged:
        ll.merge_adapters(lit)
    else:
        ll.remove_adapters(lit)
    assert attributes(lit) == before
    assert lit.save_pretrained is print
    lit.model.save_pretrained(tmp_path)
    check(tmp_path, lit.model)


@quiet
def test_the_base_is_written_while_it_is_shown(tmp_path: Path) -> None:
    lit = adapted(modules_to_save=["ln_f"])
    base = LitGPT2().model
    lit.model.transformer.ln_f.weight.data.add_(1)
    with ll.disable_adapters(lit):
        lit.model.save_pretrained(tmp_path / "base")
        lit.model.save_pretrained(tmp_path / "given", state_dict=lit.model.state_dict())
    check(tmp_path / "base", base)
    check(tmp_path / "given", base)
    lit.model.save_pretrained(tmp_path / "adapted")
    check(tmp_path / "adapted", lit.model)


COPIED: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "compiled": partial(torch.compile, backend="eager"),
}


@quiet
@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
def test_copies_pickles_and_compiled_models_do_so_too(
    tmp_path: Path, copied: Callable[[Any], Any]
) -> None:
    lit = adapted()
    other = copied(lit.model)
    lit.model = other
    randomise(lit, seed=5)
    # as a callback may in an evaluation
    with torch.inference_mode(), torch.autocast("cpu"):
        other.save_pretrained(tmp_path)
    check(tmp_path, other)
    ll.save_merged(lit, tmp_path / "gpt2-1.0")
    check(tmp_path / "gpt2-1.0", other)


class Saves(LitGPT2):  # writes a folder beside each checkpoint, as lightning-ir does
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.train()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0])[0], batch[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.save_pretrained(self.folder)

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


TWO_PROCESSES = {"strategy": "ddp_fork", "devices": 2}


@quiet
# it is random on purpose
@pytest.mark.filterwarnings("ignore::lightning_lora.FreshLayerWarning")
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param(TWO_PROCESSES, marks=pytest.mark.processes)],
    ids=["1", "2"],
)
def test_a_fit_writes_what_it_has_trained_so_far(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    module = Saves(tmp_path / "folder")
    callback = ll.LoRACallback(
        r=2, target_modules=["c_attn"], modules_to_save=["ln_f"], merge=False
    )
    ll.inject_adapters(module, callback.config)
    t = trainer(
        tmp_path, [callback, ModelCheckpoint(tmp_path, "a")], max_epochs=1, **options
    )
    t.fit(module, data())
    for name in torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]:
        assert not name.endswith("c_attn.weight")
    check(tmp_path / "folder", module.model)
    written = GPT2LMHeadModel.from_pretrained(tmp_path / "folder")
    assert not same(state(written), state(LitGPT2().model))


@quiet
def test_options_of_the_library_act_as_ever(tmp_path: Path) -> None:
    model = adapted().model
    plain = LitGPT2().model
    model.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    check(tmp_path / "parts", model)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").glob("config.json"))
    signature = inspect.signature(copy.deepcopy(model).save_pretrained)
    assert signature == inspect.signature(plain.save_pretrained)


def adapters_among(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def test_a_given_state_is_merged_if_it_holds_adapters_and_else_written_as_it_is(
    tmp_path: Path,
) -> None:
    model = adapted().model
    base = LitGPT2().model
    lit = adapted()
    randomise(lit, seed=7)
    other = lit.model
    with unchanged(model), says:
        model.save_pretrained(tmp_path / "adapters", state_dict=adapters_among(other))
    check(tmp_path / "adapters", other)
    other.transformer.ln_f.weight.data.add_(1)
    with unchanged(model), says:
        model.save_pretrained(tmp_path / "whole", state_dict=other.state_dict())
    check(tmp_path / "whole", other)
    model.save_pretrained(tmp_path / "own", state_dict=base.state_dict())
    check(tmp_path / "own", base)


def test_a_save_around_another_one_says_it_once(tmp_path: Path) -> None:
    module = adapted(Saves(tmp_path))
    with says as said:
        module.save_pretrained(tmp_path)
    assert len(said) == 1
    check(tmp_path, module.model)
    ll.save_merged(module, tmp_path / "merged")  # which is asked for merged weights
    check(tmp_path / "merged", module.model)


class Hub(nn.Module, PyTorchModelHubMixin):
    """A model of huggingface_hub's kind, which asks safetensors to write it."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.MultiheadAttention(width, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[0](x)
        output, _ = self.net[1](x, x, x)
        return output


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(tensors.items()))


@quiet
def test_a_model_of_the_hub_is_written_and_read(tmp_path: Path) -> None:
    model = as_trained(Hub(width=4), r=2, target_modules="all")
    x = torch.ones(1, 3, 4)
    model.save_pretrained(tmp_path)
    again = Hub.from_pretrained(tmp_path, strict=True)
    torch.testing.assert_close(again(x), model.eval()(x))
    written = load_file(tmp_path / "model.safetensors")
    assert_same_tensors(in_order(written), in_order(merged(model)))


def test_a_head_that_must_stay_tied_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    lit = adapted(target_modules=["lm_head"])
    folder = tmp_path / "a"
    saves: list[Callable[[Any], object]] = [
        lambda lit: lit.model.save_pretrained(folder),
        lambda lit: lit.model.save_pretrained(
            folder, state_dict=lit.model.state_dict()
        ),
        lambda lit: ll.save_merged(lit, folder),
    ]
    assert_all_refused(
        lit, saves, ll.AdapterFileError, "'.*lm_head' .*tie_word_embeddings = False"
    )
    assert not list(tmp_path.iterdir())
    lit.model.config.tie_word_embeddings = False
    folder.mkdir()
    with pytest.warns(ll.LoRAWarning, match="they are two weights now"):
        ll.save_merged(lit, folder)
    check(folder, lit.model)
    plain = adapted()
    with refused(plain, ll.AdapterFileError, "not an empty folder"):
        ll.save_merged(plain, folder)


def test_what_no_folder_can_hold_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a"
    broken = adapted()
    nan_at(trainable(broken)[0])
    with pytest.raises(ll.AdapterStateError, match="NaN"):
        broken.model.save_pretrained(folder)
    outside = LitGPT2()
    outside.head = nn.Linear(8, 2)
    adapted(outside, modules_to_save=["head"])
    with refused(outside, ll.AdapterFileError, "'head.bias' were trained outside"):
        ll.save_merged(outside, folder)
    assert not list(tmp_path.iterdir())


def test_a_state_may_be_given_by_its_position(tmp_path: Path) -> None:
    model = adapted(LitGPT2().model)
    plain = copy.deepcopy(model)
    ll.merge_adapters(plain)
    with says:
        # the directory, is_main_process, state_dict
        model.save_pretrained(tmp_path, True, model.state_dict())
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() < plain.state_dict().keys()  # which has a tied head, too
    assert_holds(plain.state_dict(), held)
    with pytest.raises(TypeError, match="multiple values"):
        model.save_pretrained(tmp_path, True, model.state_dict(), state_dict={})
