"""What a file says of its layers is checked, and earlier versions are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import nn

import lightning_lora as ll
from lightning_lora.model.view import root_of
from tests.support.cases import three
from tests.support.models import LitTiny, TinyLM, as_trained
from tests.support.storage import refused, rewrite, saved


def write(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a file of three layers whose description is changed."""
    ll.save_adapter(three(), path)
    return rewrite(path, lambda about, _: change(about))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["layers"][0].pop("kind"),
        lambda about: about["layers"][0]["parts"][0].update(more=1),
        lambda about: about.pop("layers"),
    ],
)
def test_a_description_of_another_form_is_refused(tmp_path: Path, change: Any) -> None:
    with pytest.raises(ll.AdapterFileError, match="did not write"):
        ll.load_adapter(three(), write(tmp_path / "odd.safetensors", change))


def test_adapters_of_other_rows_of_a_weight_are_refused(tmp_path: Path) -> None:
    there: dict[str, Any] = {"target_modules": ["q_proj"], "target_slices": {"q_proj": {"a": (0, 4)}}}
    saved(tmp_path / "a.safetensors", LitTiny(), **there)
    here = there | {"target_slices": {"q_proj": {"a": (4, 8)}}}
    with refused(model := as_trained(LitTiny(), **here), ll.AdapterMismatchError, "adapts other rows of the weight"):
        ll.load_adapter(model, tmp_path / "a.safetensors")


def test_what_earlier_versions_wrote_or_left_out_is_no_damage(tmp_path: Path) -> None:
    def earlier(about: dict[str, Any]) -> None:
        about.update(run={"noted": 1, "loops": 2}, copies=[])
        del about["random"], about["saved"], about["layers"][0]["parts"][0]["tokens"]

    path = write(tmp_path / "a.safetensors", earlier)
    with pytest.raises(ll.BaseMismatchError):  # which is compared last
        ll.load_adapter(three(), path)


def test_the_root_is_the_one_model_inside() -> None:
    def around(*models: nn.Module) -> nn.Module:
        outer = L.LightningModule()
        for i, model in enumerate(models):
            outer.add_module(f"model{i}", model)
        return outer

    transformer = type("PreTrainedModel", (TinyLM,), {})
    assert root_of(TinyLM()) == root_of(LitTiny()) == root_of(transformer()) == ""
    assert root_of(around(TinyLM(), nn.ReLU())) == "model0"
    assert root_of(around(TinyLM(), TinyLM())) == ""
    assert root_of(around(nn.Linear(2, 2), transformer())) == "model1"
    assert root_of(around(transformer(), transformer())) == ""
    assert root_of(nn.Sequential(nn.Sequential(transformer()))) == "0.0"
