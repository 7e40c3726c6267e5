"""Names that differ by one prefix are those of the same model."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.model.view import View
from lightning_lora.storage.renaming import Renaming
from lightning_lora.storage.stored import StoredAdapters
from tests.support.cases import At
from tests.support.models import WIDTH, Around, LitTiny, TinyLM, as_trained, is_plain
from tests.support.parameters import add_to, trainable
from tests.support.storage import fitted, restores, saved

pytestmark = pytest.mark.filterwarnings(
    "ignore:The names in the file:lightning_lora.LoRAWarning"
)


def base() -> TinyLM:
    torch.manual_seed(5)
    return TinyLM(tied=False)


def nested() -> nn.Module:
    torch.manual_seed(5)
    return nn.ModuleDict(
        {"inner": nn.ModuleDict({"q": nn.Linear(4, 4)}), "q": nn.Linear(4, 4)}
    )


def layers_in(path: Path) -> list[Any]:
    """The adapted layers that the file makes of a nested model, in its order."""
    loaded = nested()
    ll.load_adapter(loaded, path)
    return list(View(loaded).layers.items())


def test_targets_belong_to_names_in_full(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    saved(file, Around(nested()), r=2, target_modules=["model.q"])
    ((name, _),) = layers_in(file)
    assert name == "q"  # not 'inner.q'


def test_ranks_belong_to_names_in_full(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    model = Around(nested())
    saved(
        file,
        model,
        r=2,
        alpha=3,
        rank_pattern={"model.q": 1},
        alpha_pattern={"model.q": 5},
    )
    (_, inner), (_, outer) = layers_in(file)
    assert inner.lora_settings.r == 2
    assert inner.lora_settings.scaling == 1.5
    assert outer.lora_settings.r == 1
    assert outer.lora_settings.scaling == 5.0


def test_a_frozen_weight_that_changed_in_training_is_loaded(tmp_path: Path) -> None:
    there = Around(base())
    loaded = base()
    callback = ll.LoRACallback(r=2, target_modules=["q_proj"], merge=False)
    changes = At(
        1, lambda _, model: model.get_parameter("model.embed.weight").data.add_(1)
    )
    fitted(tmp_path / "a.ckpt", there, callback, changes)
    ll.load_adapter(loaded, tmp_path / "a.ckpt")
    assert torch.equal(loaded.embed.weight, there.model.embed.weight)


# a model with a head, and an encoder with a head, experts and a scale of its own
class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.Module()
        self.encoder.q = nn.Linear(WIDTH, WIDTH)
        self.encoder.head = nn.Linear(WIDTH, WIDTH)
        self.encoder.experts = Experts()
        self.encoder.scale = nn.Parameter(torch.ones(WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder.experts(
            self.encoder.head(self.encoder.q(x)) * self.encoder.scale
        )
        return self.out(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"use_rslora": True, "use_dora": True, "alpha": 3},
    "in full": {"target_modules": r"((model|0)\.)?encoder.(q|head)"},
    "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["head"]},
    "parameter": {"target_modules": ["encoder.q"], "modules_to_save": ["scale", "out"]},
    "part of a module": {"target_modules": ["q"], "modules_to_save": ["head.bias"]},
    "exclude_modules": {"exclude_modules": ["head"], "bias": "lora_only"},
    "patterns": {
        "rank_pattern": {"head": 1},
        "alpha_pattern": {"q|head": 5},
        "modules_to_save": ["out"],
    },
    "slices": {
        "target_modules": ["head"],
        "target_slices": {"head": {"a": (0, 4)}},
        "bias": "all",
    },
    "target_parameters": {
        "target_modules": ["q"],
        "target_parameters": ["w"],
        "rank_pattern": {"experts": 1},
    },
}


def plain(around: Any) -> nn.Module:
    """The model, or another around it."""
    if around is None:
        return Nested()
    return around(Nested())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("of_the_file", "here"), [(None, Around), (Around, None), (nn.Sequential, None)]
)
def test_a_file_loads_onto_the_model_inside_and_around(
    tmp_path: Path, config: Any, of_the_file: Any, here: Any
) -> None:
    there = as_trained(plain(of_the_file), r=2, **config)
    loaded = plain(here)
    for p in View(there).trainable_base.values():
        add_to(p, 1)
    ll.save_adapter(there, tmp_path / "a.safetensors")
    with pytest.warns(ll.LoRAWarning, match="taken for the same model"):
        ll.load_adapter(loaded, tmp_path / "a.safetensors")
    x = torch.randn(3, WIDTH)
    assert torch.equal(loaded(x), there(x))
    found = [p.shape for p in trainable(loaded)]
    assert found == [p.shape for p in trainable(there)]
    ll.save_adapter(loaded, tmp_path / "b.safetensors")
    restores(tmp_path / "b.safetensors", loaded, plain(here))


class Twice(Nested):
    """The model with a head and experts beside its encoder, too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()


@pytest.mark.parametrize(
    ("argument", "name", "part"),
    [
        ("modules_to_save", "model.head", "head"),
        ("target_parameters", "model.experts.w", "experts"),
    ],
)
def test_a_name_in_full_that_means_more_in_the_other_model_is_refused(
    tmp_path: Path, argument: str, name: str, part: str
) -> None:
    config: dict[str, Any] = {"target_modules": ["q"], argument: [name]}
    path = tmp_path / "a.safetensors"
    saved(path, Around(Twice()), r=2, **config)
    loaded = Twice()
    with pytest.raises(
        ll.AdapterMismatchError, match=rf"missing 'encoder\.{part}.* Build the mod"
    ):
        ll.load_adapter(loaded, path)
    assert is_plain(loaded)


# Files that do not fit


class Headed(L.LightningModule):  # a module with a model, and a head beside it
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or base()
        self.head = nn.Linear(WIDTH, 2)


class PreTrainedModel(TinyLM):
    """A model that counts as one of transformers."""


@pytest.mark.parametrize("model", [TinyLM, PreTrainedModel])
def test_what_was_trained_outside_of_the_model_is_named(
    tmp_path: Path, model: type[TinyLM]
) -> None:
    saved(
        tmp_path / "a.safetensors",
        Headed(model()),
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["head"],
    )
    inner = model()
    with pytest.raises(
        ll.AdapterMismatchError,
        match=r"'head', .*outside of 'model'.* onto the whole model",
    ):
        ll.load_adapter(inner, tmp_path / "a.safetensors")
    assert is_plain(inner)


@pytest.mark.parametrize("name", ["head", "scale"])
def test_what_the_model_has_not_is_named(tmp_path: Path, name: str) -> None:
    whole = LitTiny()
    other = LitTiny()
    whole.scale = nn.Parameter(torch.ones(1))
    del other.head
    saved(
        tmp_path / "a.safetensors",
        whole,
        r=2,
        target_modules=["q_proj"],
        modules_to_save=[name],
    )
    with pytest.raises(
        ll.AdapterMismatchError,
        match=f"do not fit LitTiny: unexpected '{name}'.* built for training",
    ):
        ll.load_adapter(other, tmp_path / "a.safetensors")
    assert is_plain(other)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: nn.ModuleDict({"a": base(), "b": base()}), "below 'a', 'b'"),
        (lambda: nn.Sequential(Headed()), r"below '0\.model'"),
        (lambda: Headed(PreTrainedModel(tied=False)), "below 'model'"),
    ],
)
def test_a_part_of_a_larger_model_that_the_file_fits_is_named(
    tmp_path: Path, build: Any, says: str
) -> None:
    saved(tmp_path / "a.safetensors", base(), r=2)
    loaded = build()
    with pytest.raises(ll.AdapterMismatchError, match=f"{says}, and .* onto that part"):
        ll.load_adapter(loaded, tmp_path / "a.safetensors")
    assert is_plain(loaded)


def described(model: nn.Module) -> StoredAdapters:
    """What a file would say of a model's adapters."""
    return StoredAdapters.from_view(View(model), ll.adapter_state_dict(model), [])


def test_all_that_is_stored_gets_the_names_of_the_model() -> None:
    model = as_trained(base(), target_modules=["q_proj"], modules_to_save=["norm"])
    there = as_trained(
        Around(base()), target_modules=["q_proj"], modules_to_save=["norm"]
    )
    here = described(model)
    renamed = described(there).with_names_of_model(Renaming("model", ""), here.config)
    assert here.state.keys() == renamed.state.keys()
    for name in ("layers", "saved", "frozen_in_state", "of_no_base"):
        assert getattr(here, name) == getattr(renamed, name), name
    assert renamed.layers.keys() == {"q_proj"}
    assert renamed.saved.keys() == {"norm"}
