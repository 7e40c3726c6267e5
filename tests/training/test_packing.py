"""Packed copies of the base live in a fit's steps, and nowhere else."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, LoRAWarning, inject_adapters, merge_adapters, remove_adapters
from lightning_lora.functional import products
from lightning_lora.layers import LoRALayer
from lightning_lora.training.packing import _nothing_packed
from tests.cases import StopError, held
from tests.functional.cases import PACKS_BFLOAT16
from tests.models import exact, is_plain, same, state, trainer

WIDTH, CLASSES = 24, 4

pytestmark = pytest.mark.skipif(not products.has_onednn(torch.float32), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True, params=["AMD", "Intel"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(products, "is_amd", lambda: request.param == "AMD")
    return str(request.param)


class LitConv(L.LightningModule):
    """A convolution of channels-last images, and a linear layer for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
            self.mix = nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, CLASSES)
        self.packed: list[set[str]] = []

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images.to(self.conv.weight.dtype, memory_format=torch.channels_last)).relu_()
        x = self.mix(x.movedim(1, -1)).relu_()
        return self.head(x.mean((1, 2)))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.packed.append(packed(self))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def packed(model: nn.Module) -> set[str]:
    """The names of the layers that have packed copies now."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    return {name for name, layer in layers.items() if layer.lora_packed is not None and layer.lora_packed.is_filled}


def images() -> DataLoader[Any]:
    x = torch.randn(16, 3, 6, 5, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, torch.arange(16) % CLASSES), batch_size=4)


def lora(**options: Any) -> LoRACallback:
    defaults = {"r": 2, "target_modules": ["conv", "mix"], "modules_to_save": ["head"], "pack_base": True}
    return LoRACallback(**(defaults | options))


def fitted(folder: Path, callback: LoRACallback, **options: Any) -> LitConv:
    torch.manual_seed(0)
    model = LitConv()
    trainer(folder, [callback], **({"enable_checkpointing": False} | options)).fit(model, images(), images())
    return model


def test_a_fit_packs_in_its_first_step_and_drops_the_copies_at_its_end(tmp_path: Path, processor: str) -> None:
    model = fitted(tmp_path, lora(merge=False))
    assert model.packed == 8 * [{"conv", "mix"} if processor == "AMD" else {"conv"}]
    assert all(layer.lora_packed is None for layer in model.modules() if isinstance(layer, LoRALayer))
    plain = fitted(tmp_path, lora(merge=False, pack_base=False))
    assert not any(plain.packed)
    torch.testing.assert_close(state(model), state(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not PACKS_BFLOAT16, reason="linear layers in bfloat16 are not packed on this processor")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_linear_layers_in_bfloat16_are_packed(tmp_path: Path, precision: Any) -> None:
    model = fitted(tmp_path, lora(), precision=precision)
    assert model.packed == 8 * [{"mix"}] and is_plain(model)
    plain = fitted(tmp_path, lora(pack_base=False), precision=precision)
    for name, tensor in state(model).items():
        assert (tensor.float() - plain.state_dict()[name].float()).norm() < 0.1 * tensor.float().norm()


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_a_module_in_evaluation_mode_is_packed_in_a_fit_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LitConv().eval()
    trainer(tmp_path, [lora()], enable_checkpointing=False).fit(model, images())
    assert not model.training and "conv" in model.packed[-1]


@exact
def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    states = []
    for epochs, start in ((4, None), (2, None), (4, tmp_path / "half.ckpt")):
        torch.manual_seed(0)
        model, t = LitConv(), trainer(tmp_path, [lora(merge=False)], max_epochs=epochs, enable_checkpointing=False)
        t.fit(model, images(), ckpt_path=start)
        t.save_checkpoint(tmp_path / ("half.ckpt" if epochs == 2 else "whole.ckpt"))
        states.append(state(model))
    assert same(states[0], states[2]) and not same(states[0], states[1])


def test_files_and_copies_hold_neither_the_copies_nor_the_argument(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            assert packed(pl_module)
            assert not packed(copy.deepcopy(pl_module.conv)) and not packed(copy.deepcopy(pl_module))
            torch.save(pl_module.conv, tmp_path / "layer.pt")
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    torch.manual_seed(0)
    t = trainer(tmp_path, [lora(), Saves()], max_steps=1, enable_checkpointing=False)
    t.fit(LitConv(), images())
    assert torch.load(tmp_path / "layer.pt", weights_only=False).lora_packed is None
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "pack_base" not in str(file) and not any(t.is_mkldnn for t in held(file).values())
    torch.manual_seed(0)
    t = trainer(tmp_path, [lora(pack_base=False), Saves()], max_steps=1, enable_checkpointing=False)
    with pytest.raises(AssertionError):
        t.fit(LitConv(), images())


def test_an_error_drops_them_too(tmp_path: Path) -> None:
    class Fails(LitConv):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx:
                raise StopError
            return loss

    model = Fails()
    with pytest.raises(StopError):
        trainer(tmp_path, [lora()], enable_checkpointing=False).fit(model, images())
    assert model.packed and not packed(model) and isinstance(model.conv, LoRALayer)


def test_a_weight_that_a_hook_changes_trains_with_its_new_values(tmp_path: Path) -> None:
    class Changes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            for layer in (pl_module.conv, pl_module.mix):
                layer.weight.data.mul_(1.1)

    states = []
    for pack in (True, False):
        torch.manual_seed(0)
        model = LitConv()
        callbacks = [lora(merge=False, pack_base=pack), Changes()]
        trainer(tmp_path, callbacks, enable_checkpointing=False).fit(model, images())
        states.append(state(model))
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


class Stops(L.Callback):
    """Stop after the first step."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise StopError


@pytest.mark.parametrize("amx", [False, True])
def test_the_first_step_says_that_nothing_was_packed_and_what_can_be(
    tmp_path: Path, processor: str, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_amx", lambda: amx)
    monkeypatch.setattr("lightning_lora.training.packing.has_onednn", lambda _: True)
    callback = lora(target_modules=["mix"], use_dora=processor == "AMD")
    with pytest.warns(LoRAWarning, match="pack_base=True has no effect") as caught, pytest.raises(StopError):
        trainer(tmp_path, [callback, Stops()], enable_checkpointing=False).fit(LitConv(), images())
    said = [str(warning.message) for warning in caught if "pack_base" in str(warning.message)]
    assert len(said) == 1 and "nn.Conv2d in float32, if the images are in torch.channels_last" in said[0]
    assert ("linear layers in float32" in said[0]) == (processor == "AMD")
    assert ("linear layers in bfloat16" in said[0]) == (not amx)


def test_without_a_cpu_or_onednn_the_warning_says_that(tmp_path: Path) -> None:
    assert "the model is on cuda:1" in _nothing_packed(torch.device("cuda:1"))
    torch._C._set_mkldnn_enabled(False)
    try:
        with pytest.warns(LoRAWarning, match="need oneDNN"):
            fitted(tmp_path, lora())
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_a_fit_says_once_how_much_was_packed(tmp_path: Path, processor: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fitted(tmp_path, lora())
    said = [record.getMessage() for record in caplog.records if "packed" in record.getMessage()]
    assert len(said) == 1 and f"packed the weights of {2 if processor == 'AMD' else 1} of 2 adapted layers" in said[0]
    assert " MB of copies" in said[0]


def test_processes_pack_their_own_copies_and_train_alike(tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            torch.save([state(pl_module), sorted(pl_module.packed[-1])], tmp_path / f"{trainer.global_rank}.pt")

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    torch.manual_seed(0)
    model = LitConv()
    t = trainer(tmp_path, [Keeps(), lora()], strategy=strategy, devices=2, enable_checkpointing=False)
    t.fit(model, images())
    (first, names), (second, others) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second) and "conv" in names and names == others and is_plain(model)


def test_a_model_without_a_trainer_packs_while_gradients_are_computed() -> None:
    model = LitConv()
    x = next(iter(images()))[0]
    inject_adapters(model, LoRAConfig(r=2, target_modules=["conv", "mix"], pack_base=True))
    with torch.no_grad():
        model.eval()(x)
    assert not packed(model)
    model.train()(x).sum().backward()
    assert "conv" in packed(model)
    model.to(torch.float64)
    assert not packed(model)
    model.to(torch.float32)(x)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["conv", "mix"]))
    model(x)
    assert not packed(model)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["conv", "mix"], pack_base=True))
    model(x)
    merge_adapters(model)
    assert "lora_packed" not in {*vars(model.conv), *vars(model.mix)}
    remove_adapters(model)


def test_a_compiled_model_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LitConv()
    t = trainer(tmp_path, [lora(merge=False)], enable_checkpointing=False)
    with pytest.warns(LoRAWarning, match="has no effect"):
        t.fit(torch.compile(model, backend="aot_eager"), images())  # type: ignore[arg-type]  # Lightning takes it
    plain = fitted(tmp_path, lora(merge=False, pack_base=False))
    torch.testing.assert_close(state(model), state(plain), rtol=1e-3, atol=1e-4)


def test_evaluation_changes_no_bit_by_a_fresh_adapter() -> None:
    model, x = LitConv().eval(), next(iter(images()))[0]
    before = model(x)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["conv", "mix"]))
    assert torch.equal(model(x), before)  # in evaluation mode, gradients or not
    with torch.no_grad():
        assert torch.equal(model(x), before)
    torch.testing.assert_close(model.train()(x), before, rtol=1e-5, atol=1e-5)


def test_evaluation_after_a_fit_packs_nothing(tmp_path: Path) -> None:
    callback = lora(merge=False)
    model = fitted(tmp_path, callback)
    trainer(tmp_path, [callback], enable_checkpointing=False).validate(model, images(), verbose=False)
    assert all(layer.lora_packed is None for layer in model.modules() if isinstance(layer, LoRALayer))


def test_a_layer_that_is_spread_over_processes_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LitConv()
    monkeypatch.setattr("lightning_lora.model.packing.is_spread", lambda tensor: tensor is model.mix.weight)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["conv", "mix"], pack_base=True))
    model.train()(next(iter(images()))[0]).sum().backward()
    assert packed(model) == {"conv"} and isinstance(model.mix, LoRALayer) and model.mix.lora_packed is None


def test_a_second_fit_packs_again(tmp_path: Path) -> None:
    model = fitted(tmp_path, lora(merge=False))
    model.packed.clear()
    trainer(tmp_path, [lora(merge=False)], max_steps=1, enable_checkpointing=False).fit(model, images())
    assert "conv" in model.packed[0] and not packed(model)


def test_a_fit_that_fails_before_its_first_step_does_not_complain_of_packing(tmp_path: Path) -> None:
    class Fails(LitConv):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise StopError

    with pytest.raises(StopError), warnings.catch_warnings(record=True) as caught:
        trainer(tmp_path, [lora()], enable_checkpointing=False).fit(Fails(), images())
    assert not [warning for warning in caught if "pack_base" in str(warning.message)]
