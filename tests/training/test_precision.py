"""Every precision trains, saves and resumes right."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAWarning, MergePrecisionWarning
from tests.support.cases import held
from tests.support.models import ADAPTERS, TRAINED, LitTiny, best, data, exact, is_plain, lora, same, state, trainer


@exact
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_every_precision_trains_saves_resumes_and_merges(tmp_path: Path, precision: Any) -> None:
    # Adam's epsilon is zero in float16, so that a head trained whole, which is in it, would diverge
    head = {"modules_to_save": None, "exclude_modules": ["head"]} if precision == "16-true" else {}

    def run(folder: str, epochs: int, ckpt: Any = None) -> tuple[LitTiny, Any]:
        torch.manual_seed(0)
        model, checkpoint = LitTiny(), best(tmp_path / folder, monitor=None)
        t = trainer(tmp_path, [lora(dropout=0.3, **head), checkpoint], max_epochs=epochs, precision=precision)
        t.fit(model, data(), data(), ckpt_path=ckpt)
        return model, checkpoint.best_model_path

    whole, path = run("whole", 4)
    _, part = run("part", 2)
    resumed, _ = run("part", 4, part)
    assert is_plain(whole) and same(state(resumed), state(whole))
    wide = torch.float64 if precision == "64-true" else torch.float32
    stored = torch.load(path, weights_only=True)
    assert {stored["state_dict"][name].dtype for name in ADAPTERS} == {wide}
    assert sorted(held(stored)) == sorted(ADAPTERS if head else TRAINED)
    results = [
        trainer(tmp_path, [lora(dropout=0.3, **head)], precision=precision).test(
            model, data(), ckpt_path=path, verbose=False
        )
        for model in (whole, LitTiny())
    ]
    assert results[0] == results[1]


def test_mixed_float16_is_as_lightning_has_it_on_this_device(tmp_path: Path) -> None:
    model = LitTiny()
    with pytest.warns(UserWarning, match="not supported on CPU. Using `precision='bf16-mixed'`"):
        t = trainer(tmp_path, [lora(merge=False)], precision="16-mixed")
    t.fit(model, data())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(model.get_parameter(name).any() for name in ADAPTERS)


def test_fit_warns_once_of_a_merge_that_loses_the_update(tmp_path: Path) -> None:
    model, t = LitTiny(lr=1e-7), trainer(tmp_path, [lora()], precision="bf16-true")
    with pytest.warns(MergePrecisionWarning) as caught:
        t.fit(model, data())
    assert len([w for w in caught if issubclass(w.category, LoRAWarning)]) == 1
    t.validate(model, data(), verbose=False)  # merges again, and an unexpected warning is an error here
