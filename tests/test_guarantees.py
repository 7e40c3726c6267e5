"""What the package promises: one short test for each promise.

``pytest tests/test_guarantees.py`` takes less than a minute. It is the place to begin
reading, and to look after a change. The other tests ask the same of every kind of
layer, strategy, file and callback.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.faults import fork
from tests.support.models import ADAPTERS, LitTiny, X, data, lora, trainer

# What the tests have in common


def fitted(
    folder: Path,
    model: L.LightningModule,
    *,
    epochs: int = 2,
    ckpt_path: Path | None = None,
    **arguments: Any,
) -> L.Trainer:
    """Fit a module with a LoRACallback of these arguments. The Trainer is returned."""
    # a run that goes on does not find its numbers by chance
    torch.manual_seed(0 if ckpt_path is None else 1)
    ours = trainer(folder, [ll.LoRACallback(r=2, **arguments)], max_epochs=epochs)
    ours.fit(model, data(), ckpt_path=ckpt_path)
    return ours


def adapted(model: Any) -> Any:
    """The model with adapters whose updates are not zero."""
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    state = ll.adapter_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        state[name] = torch.randn(value.shape, generator=generator)
    ll.load_adapter_state_dict(model, state)
    return model


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


class TwoNetworks(LitTiny):
    """A module whose loss asks a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 8)
        self.teacher.requires_grad_(False)

    def forward(self, index: Tensor) -> Tensor:
        self.teacher(self.embed(index))
        return super().forward(index)


class Detaches(LitTiny):
    """A module whose loss does not reach q_proj."""

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        logits: Tensor = self.head(torch.tanh(self.q_proj(x)).detach() + self.v_proj(x))
        return logits


class ReadsByHand(LitTiny):
    """A module whose loss reads an adapted weight, where the adapter has no part."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + self.q_proj.weight.pow(2).sum()


# The model


def test_a_fresh_adapter_changes_no_bit() -> None:
    model = LitTiny()
    before = model(X)
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert torch.equal(model(X), before)


def test_train_eval_and_inference_mode_compute_the_same() -> None:
    model = adapted(
        nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        )
    )
    x = torch.randn(2, 3, 8)
    in_training = model(x)
    model.eval()
    torch.testing.assert_close(model(x), in_training)
    with torch.inference_mode():  # where torch takes a fast path that reads the weights
        torch.testing.assert_close(model(x), in_training)


def test_a_merge_computes_the_same_and_leaves_a_plain_model() -> None:
    plain_type = type(LitTiny().q_proj)
    model = adapted(LitTiny())
    before = model(X)
    ll.merge_adapters(model)
    # the sums are in another order
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    assert type(model.q_proj) is plain_type
    assert list(model.state_dict()) == list(LitTiny().state_dict())


def test_unmerging_gives_every_bit_back() -> None:
    model = adapted(LitTiny())
    before = copy_of_state(model)
    ll.merge_adapters(model)
    ll.unmerge_adapters(model)
    assert_same_tensors(copy_of_state(model), before)


# A fit


def test_training_changes_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    model = LitTiny()
    base = copy_of_state(model)
    fitted(tmp_path, model, merge=False)
    assert_holds(model.state_dict(), base)
    for name in ADAPTERS:
        assert model.state_dict()[name].count_nonzero() > 0


def test_the_optimizer_holds_what_trains_and_nothing_else(tmp_path: Path) -> None:
    model = LitTiny()
    optimizer = fitted(
        tmp_path, model, merge=False, modules_to_save=["head"]
    ).optimizers[0]
    held = [
        id(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    trained = [
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    ]
    assert sorted(held) == sorted(trained)


def test_after_a_fit_the_module_is_plain_and_merged(tmp_path: Path) -> None:
    model = LitTiny()
    fitted(tmp_path, model)
    assert type(model.q_proj) is nn.Linear
    assert not torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)
    ll.unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


def test_an_evaluation_with_nothing_to_load_adds_nothing(tmp_path: Path) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora()]).test(model, data(), verbose=False)
    assert_same_tensors(copy_of_state(model), copy_of_state(LitTiny()))


def test_what_stands_still_beside_what_trains_stays_as_it_is(tmp_path: Path) -> None:
    model = TwoNetworks()
    fitted(tmp_path, model, merge=False)
    assert type(model.teacher) is nn.Linear


def test_what_the_user_set_in_a_parameter_group_is_kept(tmp_path: Path) -> None:
    class Groups(LitTiny):
        def configure_optimizers(self) -> Any:
            slow = {"params": self.q_proj.parameters(), "lr": 0.01}
            fast = {"params": self.v_proj.parameters(), "lr": 0.02}
            return torch.optim.SGD([slow, fast])

    model = Groups()
    optimizer = fitted(
        tmp_path, model, merge=False, target_modules=["q_proj", "v_proj"]
    ).optimizers[0]
    slow, fast = optimizer.param_groups
    assert slow["lr"] == 0.01
    assert slow["params"] == [model.q_proj.lora_A, model.q_proj.lora_B]
    assert fast["lr"] == 0.02
    assert fast["params"] == [model.v_proj.lora_A, model.v_proj.lora_B]


# Nothing that trains too little is quiet


def test_a_new_head_that_would_stay_frozen_is_named(tmp_path: Path) -> None:
    class Big(LitTiny):
        def __init__(self) -> None:
            super().__init__(width=64)
            # rows of different sizes, as training leaves them
            pretrained = torch.randn(64, 64) * torch.rand(64, 1)
            self.q_proj.weight.data = pretrained
            self.v_proj.weight.data = pretrained.clone()

    with pytest.warns(ll.FreshLayerWarning, match=r"modules_to_save=\['head'\]"):
        fitted(tmp_path, Big(), target_modules=["q_proj", "v_proj"])


def test_adapters_without_a_gradient_are_named(tmp_path: Path) -> None:
    with pytest.warns(
        ll.DeadAdapterWarning, match="The adapters of 'q_proj' received no gradient"
    ):
        fitted(tmp_path, Detaches())


def test_code_that_reads_an_adapted_weight_by_hand_is_named(tmp_path: Path) -> None:
    with pytest.warns(ll.LoRAWarning, match="q_proj"):
        fitted(tmp_path, ReadsByHand(), target_modules=["q_proj", "v_proj"])


# Files


def test_a_checkpoint_holds_the_adapters_alone(tmp_path: Path) -> None:
    ours = fitted(tmp_path, LitTiny(), merge=False, target_modules=["q_proj", "v_proj"])
    ours.save_checkpoint(tmp_path / "fit.ckpt")
    state = torch.load(tmp_path / "fit.ckpt", weights_only=True)["state_dict"]
    *names, note = state
    # a sentence for whoever loads the file as a full one
    assert state[note].numel() == 0
    assert sorted(names) == sorted(ADAPTERS)


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    through = LitTiny()
    fitted(tmp_path, through, merge=False, dropout=0.1)

    cut = LitTiny()
    first = fitted(tmp_path, cut, merge=False, dropout=0.1, epochs=1)
    first.save_checkpoint(tmp_path / "cut.ckpt")
    resumed = LitTiny()
    fitted(tmp_path, resumed, merge=False, dropout=0.1, ckpt_path=tmp_path / "cut.ckpt")

    assert_same_tensors(ll.adapter_state_dict(resumed), ll.adapter_state_dict(through))


class WithSGD(LitTiny):
    """A module whose steps do not make rounding larger, as those of Adam do."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def begun() -> LitTiny:
    """A module with fresh adapters, always the same."""
    torch.manual_seed(0)
    model = WithSGD()
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    return model


def fit_in(processes: int, path: Path) -> None:
    """Fit in processes that share each batch of four, and save the weights."""
    model = begun()
    ours = trainer(
        path.parent,
        [ll.LoRACallback(merge=False)],
        strategy="ddp_fork",
        devices=processes,
    )
    ours.fit(model, data(batch_size=4 // processes))
    torch.save(model.state_dict(), path)


@pytest.mark.processes
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    assert fork(lambda: fit_in(1, tmp_path / "one.pt")) == 0
    assert fork(lambda: fit_in(2, tmp_path / "two.pt")) == 0
    torch.testing.assert_close(
        torch.load(tmp_path / "two.pt"), torch.load(tmp_path / "one.pt")
    )


def test_a_file_is_loaded_onto_its_base_and_gives_the_same_outputs(
    tmp_path: Path,
) -> None:
    model = adapted(LitTiny())
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = LitTiny()
    ll.load_adapter(loaded, tmp_path / "adapter.safetensors")
    assert torch.equal(loaded(X), model(X))


def test_loading_a_file_twice_applies_it_once(tmp_path: Path) -> None:
    model = adapted(LitTiny())
    before = model(X)
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    ll.load_adapter(model, tmp_path / "adapter.safetensors")
    ll.merge_adapters(model)
    ll.load_adapter(model, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(model(X), before)


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    ll.save_adapter(adapted(LitTiny()), tmp_path / "adapter.safetensors")
    other = LitTiny()
    other.q_proj.weight.data[0, 0] += 1
    before = copy_of_state(other)
    with pytest.raises(ll.BaseMismatchError, match="q_proj"):
        ll.load_adapter(other, tmp_path / "adapter.safetensors")
    assert_same_tensors(copy_of_state(other), before)


def test_a_file_in_which_one_bit_was_flipped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    ll.save_adapter(adapted(LitTiny()), path)
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1  # in the last value
    path.write_bytes(contents)
    with pytest.raises(ll.AdapterFileError, match=r"adapter\.safetensors"):
        ll.load_adapter(LitTiny(), path)


def test_peft_reads_the_export_and_computes_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))
    ll.export_peft(model, tmp_path)
    base = copy.deepcopy(model)
    ll.remove_adapters(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs(x), model(x))


def test_a_state_that_other_code_saves_loads_to_what_the_model_computes() -> None:
    model = adapted(LitTiny())
    state = copy_of_state(model)
    loaded = LitTiny()
    ll.inject_adapters(loaded, ll.LoRAConfig(r=2))
    loaded.load_state_dict(state)
    assert torch.equal(loaded(X), model(X))


def test_importing_the_package_changes_nothing_of_the_process() -> None:
    before = (
        "import torch, lightning.pytorch as L; import warnings; state = "
        "(torch.autograd.grad, list(warnings.filters))"
    )
    after = (
        "import lightning_lora; assert state == (torch.autograd.grad, "
        "list(warnings.filters))"
    )
    subprocess.run([sys.executable, "-c", f"{before}; {after}"], check=True)
