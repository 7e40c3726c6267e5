"""The monitor measures what adapters have learned, and changes nothing."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

import lightning_lora as ll
from lightning_lora import LoRAMonitor
from lightning_lora.measured import measured_matrices
from lightning_lora.model.view import View
from tests.support import sharded
from tests.support.cases import At
from tests.support.fits import Notes
from tests.support.models import LitTiny, data, lora, same, state, trainer
from tests.support.ranks import run_ranks


def test_the_numbers_of_updates_are_those_of_plain_matrices(tmp_path: Path) -> None:
    notes = Notes()
    model = LitTiny()
    monitor = LoRAMonitor(3, per_layer=True)
    callbacks = [monitor, lora(alpha=None, merge=False)]
    trainer(tmp_path, callbacks, logger=notes, log_every_n_steps=1, max_steps=6).fit(
        model, data()
    )
    norms = {}
    ranks = {}
    for name, layer in View(model).layers.items():
        values = torch.linalg.svdvals(
            layer.get_parameter("lora_B").double()
            @ layer.get_parameter("lora_A").double()
        )
        shares = (values / values.sum())[:2]
        norms[f"/{name}"] = values.norm()
        ranks[f"/{name}"] = (-shares * shares.log()).sum().exp()
    norms[""] = torch.stack([*norms.values()]).norm()
    ranks[""] = torch.stack([*ranks.values()]).mean()
    last = {
        name: value
        for name, value in notes.metrics[-1].items()
        if name.startswith("lora/")
    }
    assert last == {
        **{
            f"lora/update_norm{name}": pytest.approx(value.item(), 1e-5)
            for name, value in norms.items()
        },
        **{
            f"lora/effective_rank{name}": pytest.approx(value.item(), 1e-5)
            for name, value in ranks.items()
        },
    }
    each = [
        line["lora/update_norm"] for line in notes.metrics if "lora/update_norm" in line
    ]
    assert len(set(each)) == 3
    assert each[0] == each[1] > 0


def test_a_run_that_diverges_goes_on_and_shows_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoils = At(2, lambda _, module: module.q_proj.lora_A.data.fill_(torch.nan))
    t = trainer(tmp_path, [LoRAMonitor(1), lora(merge=False), spoils])
    t.fit(LitTiny(), data())
    assert t.global_step == 8
    assert t.callback_metrics["lora/update_norm"].isnan()
    assert "ERROR" not in capfd.readouterr().out  # LAPACK's


def test_a_run_has_the_same_bits_with_a_monitor(tmp_path: Path) -> None:
    ends = []
    for monitor in ([], [LoRAMonitor(1)]):
        torch.manual_seed(4)
        t = trainer(tmp_path, [*monitor, lora()])
        model = LitTiny()
        t.fit(model, data(), data())
        own = {
            name: value
            for name, value in t.callback_metrics.items()
            if not name.startswith("lora/")
        }
        ends.append((state(model), own, torch.get_rng_state()))
    (weights, *numbers, random), (weights2, *numbers2, random2) = ends
    assert same(weights, weights2)
    assert torch.equal(random, random2)
    assert numbers == numbers2


def sharded_fit(folder: Path) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    model = sharded.LitNet()
    t = sharded.trainer_of(
        "sharded", folder, [sharded.lora(modules_to_save=["head"]), LoRAMonitor(1)]
    )
    t.fit(model, sharded.data(), sharded.data())
    norms = [
        (b @ a).norm()
        for a, b in (update.factors() for update in measured_matrices(model).values())
    ]
    found = {name: value.item() for name, value in t.callback_metrics.items()}
    assert found["lora/update_norm"] == pytest.approx(torch.stack(norms).norm().item())
    return found


@pytest.mark.processes
def test_numbers_of_sharded_modules(tmp_path: Path) -> None:
    one, other = run_ranks(sharded_fit, tmp_path)
    assert one == other


def test_a_command_line_of_the_other_lightning_package_takes_it() -> None:
    code = (
        "import pytorch_lightning as pl, lightning_lora as ll; assert "
        "issubclass(ll.LoRAMonitor, pl.Callback)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there_is_named_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(
        ll.AdapterStateError, match=r"no adapters in LitTiny\. Add LoRACallback"
    ):
        trainer(tmp_path, [LoRAMonitor()]).fit(LitTiny(), data(), data())
    with pytest.raises(ll.ConfigError, match="every_n_steps=0"):
        LoRAMonitor(0)
    rows = ll.LoRACallback(target_modules=[], trainable_token_indices={"embed": [1]})
    t = trainer(tmp_path, [LoRAMonitor(), rows])
    t.fit(LitTiny(), data(), data())
    assert "lora/update_norm" not in t.callback_metrics
