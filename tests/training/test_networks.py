"""A LightningModule is not one network: what stands still stays as it is, and copies follow."""

import copy
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_lora as ll
from tests.support.compared import assert_holds
from tests.support.fits import KeepsStates
from tests.support.messages import lines_with
from tests.support.models import trainer
from tests.support.parameters import adapted_layers, linear_layers, trainable_names

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*in eval mode at the start of training"
)
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Single-digit widths make layers too small to look untrained.
    """
    layers: list[nn.Module] = []
    for reads, writes in pairwise(widths):
        layers.append(nn.Linear(reads, writes))
        layers.append(nn.ReLU())
    layers.pop()
    return nn.Sequential(*layers)


def frozen_mlp(*widths: int) -> nn.Sequential:
    return mlp(*widths).requires_grad_(False)


class Module(L.LightningModule):
    """Each has a ``build`` and a ``loss``.

    The optimizer gets all parameters, or the net's.
    """

    def __init__(self, optimized: str = "all") -> None:
        super().__init__()
        self.optimized = optimized
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.build()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def configure_optimizers(self) -> Any:
        parameters = self.parameters()
        if self.optimized == "net":
            parameters = self.net.parameters()  # type: ignore[union-attr,operator]
        return torch.optim.Adam(parameters, lr=0.01)


class Perceptual(Module):
    """A frozen network in the loss."""

    def build(self) -> None:
        self.net = mlp(8, 15, 15, 8)
        self.vgg = frozen_mlp(8, 15, 4)

    def loss(self, x: Tensor) -> Tensor:
        difference = self.vgg(self.net(x)) - self.vgg(x)
        return difference.square().mean()


class SmallBesideLarge(Perceptual):
    """The network that trains has two layers, as a head may, and the one in the loss most of the weights."""

    def build(self) -> None:
        self.net = mlp(8, 9, 8)
        self.vgg = frozen_mlp(8, 15, 15, 4)


class Distilled(SmallBesideLarge):
    """A frozen teacher, which passes no gradients."""

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.vgg(x)
        difference = self.net(x)[:, :4] - wanted
        return difference.square().mean()


class AlikeInShape(Distilled):
    """A teacher of the same layers with other weights, which is no copy."""

    def build(self) -> None:
        self.net = mlp(8, 15, 15, 4)
        self.vgg = frozen_mlp(8, 15, 15, 4)


class NotGiven(SmallBesideLarge):
    """Nobody froze it, but the optimizer does not get it."""

    def build(self) -> None:
        super().build()
        self.vgg.requires_grad_(True)
        self.optimized = "net"


class FrozenLate(NotGiven):
    """It is frozen when the optimizer is made."""

    def configure_optimizers(self) -> Any:
        self.vgg.requires_grad_(False)
        self.optimized = "all"
        return super().configure_optimizers()


class Headed(Module):
    """A frozen backbone under a head that is trained already."""

    def build(self) -> None:
        self.net = nn.ModuleDict(
            {"backbone": frozen_mlp(8, 15, 15, 8), "head": nn.Linear(8, 2)}
        )

    def features(self, x: Tensor) -> Tensor:
        return self.net["backbone"](x)

    def output(self, x: Tensor) -> Tensor:
        return self.net["head"](self.features(x))

    def loss(self, x: Tensor) -> Tensor:
        return self.output(x).square().mean()


class Recomputed(Headed):
    """Its backbone is behind a reentrant checkpoint, whose graph nobody sees."""

    def features(self, x: Tensor) -> Any:
        return checkpoint(self.net["backbone"], x, use_reentrant=True)


class AllFrozen(Headed):
    def build(self) -> None:
        super().build()
        self.net.requires_grad_(False)


class Momentum(Module):
    """A network and a copy that follows it, as in BYOL."""

    def build(self) -> None:
        self.net = mlp(8, 15, 4)
        self.copy_now()

    def copy_now(self) -> None:
        self.copy = copy.deepcopy(self.net).requires_grad_(False)

    def move_copy(self) -> None:
        for p, q in zip(self.net.parameters(), self.copy.parameters(), strict=True):
            q.data = q.data.lerp(p.data, 0.01)

    def loss(self, x: Tensor) -> Tensor:
        self.move_copy()
        from_copy = self.net(x) - self.copy(x.roll(1, 0))
        from_one = self.net(x) - 1
        return from_copy.square().mean() + from_one.square().mean()


class Average(Momentum):
    """A copy that nobody froze, as in timm's ModelEma."""

    def copy_now(self) -> None:
        self.copy = nn.ModuleDict({"module": copy.deepcopy(self.net)}).eval()

    @torch.no_grad()
    def move_copy(self) -> None:
        for p, q in zip(self.net.parameters(), self.copy.parameters(), strict=True):
            q.lerp_(p, 0.01)

    def loss(self, x: Tensor) -> Tensor:
        self.move_copy()
        from_one = self.net(x) - 1
        return from_one.square().mean()


class MadeInSetup(Momentum):
    def build(self) -> None:
        self.net = mlp(8, 15, 4)

    def setup(self, stage: str) -> None:
        self.copy_now()


def fit(
    folder: Path,
    module: Any,
    *callbacks: Any,
    ckpt_path: Any = None,
    epochs: int = 4,
    run: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """Fit a module with adapters, which stay on it in one process.

    ``run`` are options of the Trainer.
    """
    adapters = ll.LoRACallback(**{"r": 2, "merge": False, **config})
    t = trainer(
        folder,
        [adapters, *callbacks],
        max_epochs=epochs,
        enable_checkpointing=len(callbacks) > 0,
        **(run or {}),
    )
    loader = DataLoader(TensorDataset(X), batch_size=4)
    t.fit(module, loader, ckpt_path=ckpt_path)
    return module


def keeps_each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1)


def assert_same_values(module: nn.Module, other: nn.Module) -> None:
    """All that the first one holds, the other holds too."""
    assert_holds(other.state_dict(), module.state_dict())


# What stands still


@pytest.mark.parametrize(
    ("kind", "optimized", "target_modules"),
    [
        (Perceptual, "all", "all-linear"),
        (SmallBesideLarge, "net", "all"),
        (Distilled, "all", "all"),
        (AlikeInShape, "all", "all-linear"),
        (NotGiven, "net", "all-linear"),
        (FrozenLate, "all", "all-linear"),
    ],
)
def test_a_network_that_stands_still_beside_one_that_trains_gets_no_adapter(
    tmp_path: Path, kind: Any, optimized: str, target_modules: str, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        module = fit(
            tmp_path, kind(optimized), target_modules=target_modules, bias="all"
        )
    assert_same_values(kind().vgg, module.vgg)
    in_net = [f"net.{name}" for name in linear_layers(module.net)]
    assert adapted_layers(module) == in_net
    (told,) = lines_with("No adapter for 'vgg'", caplog.messages)
    assert "name its layers in target_modules" in told


@pytest.mark.parametrize(
    ("kind", "optimized"), [(Headed, "net"), (Recomputed, "all"), (AllFrozen, "all")]
)
def test_a_frozen_backbone_is_adapted_under_a_head_alone(
    tmp_path: Path, kind: Any, optimized: str, caplog: Any
) -> None:
    backbone = ["net.backbone.0", "net.backbone.2", "net.backbone.4"]
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, kind(optimized))
    assert adapted_layers(module) == [*backbone, "net.head"]
    assert module.net["backbone"][0].lora_B.any()
    is_said = "exclude_modules=['net.backbone']" in caplog.text
    assert is_said == (kind is not AllFrozen)
    with_saved_head = fit(tmp_path, kind(optimized), modules_to_save=["head"])
    assert adapted_layers(with_saved_head) == backbone


def test_a_frozen_backbone_is_adapted_under_a_large_head_that_looks_untrained() -> None:
    backbone = mlp(64, 64, 64, 64, 64, 64, 64, 64)
    for layer in linear_layers(backbone).values():
        layer.weight.data += 0.1 * torch.outer(torch.randn(64), torch.randn(64))
    backbone.requires_grad_(False)
    model = nn.ModuleDict({"backbone": backbone, "head": mlp(64, 64, 64, 64)})
    names = ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert lines_with("backbone", names)


def test_whoever_names_a_layer_gets_an_adapter_there(tmp_path: Path) -> None:
    module = fit(tmp_path, Perceptual(), target_modules=["0", "2", "4"])
    assert len(adapted_layers(module)) == 5


class Decoder(Module):
    """A frozen network, the only one with linear layers, and a decoder of its size that is written for it."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Conv1d(9, 9, 1),
            nn.Conv1d(9, 9, 1),
            nn.Conv1d(9, 9, 1),
            nn.Conv1d(9, 9, 1),
        )
        self.frozen = frozen_mlp(8, 9, 8)

    def decode(self, x: Tensor) -> Tensor:
        channels = x[:, None].expand(-1, 9, -1)
        return self.net(channels).mean(1)

    def loss(self, x: Tensor) -> Tensor:
        error = self.decode(self.frozen(x)) - x
        return error.square().mean()


class Teacher(Decoder):
    """A decoder that is not."""

    def loss(self, x: Tensor) -> Tensor:
        error = self.decode(x) - self.frozen(x)
        return error.square().mean()


@pytest.mark.filterwarnings("ignore:target_modules=", "ignore:You have frozen most")
@pytest.mark.parametrize("optimized", ["all", "net"])
def test_a_frozen_network_that_alone_has_what_is_targeted_is_adapted_if_what_trains_reads_it(
    tmp_path: Path, optimized: str
) -> None:
    module = fit(tmp_path, Decoder(optimized))
    assert adapted_layers(module) == ["frozen.0", "frozen.2"]
    with pytest.raises(
        ll.TargetError,
        match=r"No adapter for 'frozen' of Teacher.* No other layer has an adapter",
    ):
        fit(tmp_path, Teacher(optimized))


# Copies


def follower(module: Any) -> Any:
    """The network that follows: the copy itself, or what is in it."""
    if isinstance(module.copy, nn.ModuleDict):
        return module.copy["module"]
    return module.copy


def movement(network: nn.Module, base: nn.Module) -> Tensor:
    """By how much the weights of a network have moved away from those of its base, in one vector."""
    moved = []
    for name, layer in linear_layers(network).items():
        difference = layer.weight - base.get_submodule(name).weight
        moved.append(difference.flatten())
    return torch.cat(moved)


def assert_follows(module: Any, base: Any) -> None:
    """The copy has moved where its original has moved."""
    of_net = movement(module.net, base.net)
    of_copy = movement(follower(module), base.net)
    assert cosine_similarity(of_net, of_copy, dim=0) > 0.9


@pytest.mark.parametrize(
    ("kind", "optimized"), [(Momentum, "all"), (Average, "net"), (MadeInSetup, "all")]
)
def test_a_copy_follows_its_original(
    tmp_path: Path, kind: Any, optimized: str, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, kind(optimized), epochs=8)
    assert f"Copies in {kind.__name__}: 'copy" in caplog.text
    assert not lines_with("lora", trainable_names(module.copy))
    ll.merge_adapters(module)
    assert_follows(module, kind("net"))


def test_the_share_that_trains_is_told_again_without_what_is_left_out(
    tmp_path: Path, caplog: Any
) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, SmallBesideLarge(), run={"logger": logger})
    share = ll.summarize(module).share
    assert f"Now {share:.2%} of its parameters train" in caplog.text
    file = Path(logger.log_dir) / "lora.json"
    logged = json.loads(file.read_text())
    assert logged["lora/trained_share"] == share


class Baseline(MadeInSetup):
    """A copy that nobody froze, and that the optimizer holds too, as the rollout baseline of rl4co."""

    def copy_now(self) -> None:
        self.copy = copy.deepcopy(self.net)

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self.copy(x)
        error = self.net(x) - reference - 1
        return error.square().mean()


@pytest.mark.parametrize(
    ("kind", "optimized", "save"),
    [
        (Perceptual, "all", "adapters"),
        (NotGiven, "net", "model"),
        (Average, "net", "adapters"),
        (MadeInSetup, "net", "adapters"),
        (Baseline, "all", "adapters"),
    ],
)
def test_a_run_resumes_merges_and_loads_exactly(
    tmp_path: Path, kind: Any, optimized: str, save: str
) -> None:
    through = fit(tmp_path, kind(optimized), keeps_each_epoch(tmp_path), save=save)
    resumed = fit(tmp_path, kind(optimized), ckpt_path=tmp_path / "epoch=1.ckpt")
    loaded = kind(optimized)
    loaded.setup("fit")
    loaded.requires_grad_(True)
    ll.load_adapter(loaded, tmp_path / "epoch=3.ckpt")
    before = copy.deepcopy(through)
    other = follower(through) if hasattr(through, "copy") else through.vgg
    wanted = other(X)
    ll.merge_adapters(through)
    torch.testing.assert_close(other(X), wanted)
    ll.unmerge_adapters(through)
    assert_same_values(before, through)
    assert_same_values(before, resumed)
    assert_same_values(before, loaded)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (SmallBesideLarge, ["net.0", "net.2"]),
        (MadeInSetup, ["net.0", "net.2", "copy.0", "copy.2"]),
    ],
)
def test_it_is_so_in_several_processes(
    tmp_path: Path, kind: Any, names: list[str]
) -> None:
    run = {"strategy": "ddp_fork", "devices": 2}
    keeps = KeepsStates(tmp_path)
    through = fit(
        tmp_path, kind("net"), keeps_each_epoch(tmp_path), keeps, merge="last", run=run
    )
    factors = lines_with("lora_A", keeps.same())
    assert factors == [f"{name}.lora_A" for name in names]
    resumed = fit(
        tmp_path,
        kind("net"),
        ckpt_path=tmp_path / "epoch=1.ckpt",
        merge="last",
        run=run,
    )
    assert_same_values(through, resumed)


def test_a_copy_that_is_left_out_loses_the_adapters_that_it_was_copied_with(
    tmp_path: Path,
) -> None:
    module = fit(tmp_path, Baseline("net"), exclude_modules=["copy"])
    assert adapted_layers(module) == ["net.0", "net.2"]


def test_an_attention_of_which_only_the_output_trains_is_no_network_of_its_own() -> (
    None
):
    attention = nn.MultiheadAttention(8, 2)
    attention.in_proj_weight.requires_grad_(False)
    model = nn.ModuleDict({"attention": attention, "others": mlp(8, 15, 15, 15)})
    with pytest.warns(ll.LoRAWarning, match="No adapter for 'attention'"):
        names = ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert names == ("others.0", "others.2", "others.4")


def test_two_critics_and_their_targets_are_two_pairs() -> None:
    one = mlp(4, 9, 1)
    critics = nn.ModuleDict({"one": one, "two": copy.deepcopy(one)})
    targets = copy.deepcopy(critics).requires_grad_(False)
    model = nn.ModuleDict({"critics": critics, "targets": targets})
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    for name in ("one", "two"):
        assert torch.equal(targets[name][0].lora_A, critics[name][0].lora_A)


@pytest.mark.parametrize("kind", [Momentum, Average])
def test_what_trains_in_full_does_not_in_a_copy(tmp_path: Path, kind: Any) -> None:
    module = fit(tmp_path, kind("net"), modules_to_save=["2"], bias="lora_only")
    assert trainable_names(module) == [
        "net.0.bias",
        "net.0.lora_A",
        "net.0.lora_B",
        "net.2.weight",
        "net.2.bias",
    ]
    ll.merge_adapters(module)
    base = kind("net").net[2].weight
    of_net = module.net[2].weight - base
    of_copy = follower(module)[2].weight - base
    assert cosine_similarity(of_net.flatten(), of_copy.flatten(), dim=0) > 0.9


@pytest.mark.filterwarnings("ignore:No adapter for 'net.2'")
@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["net.2"]}, {"exclude_modules": ["net.2"]}, {}],
    ids=str,
)
def test_a_copy_has_adapters_exactly_where_its_original_has(options: Any) -> None:
    module = Momentum("net")
    is_named = bool(options)
    module.net[2].requires_grad_(is_named)
    ll.inject_adapters(module, ll.LoRAConfig(r=2, **options))
    assert adapted_layers(module) == ["net.0", "copy.0"]


class Adversarial(Headed):
    """A head's network and its judge, each with an optimizer, of which the judge's steps first."""

    def build(self) -> None:
        super().build()
        self.judge = nn.Linear(2, 1)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        of_net, of_judge = self.optimizers()  # type: ignore[misc]
        with torch.no_grad():
            fixed = self.output(batch[0])
        self.step(of_judge, fixed)
        self.step(of_net, self.output(batch[0]))

    def step(self, optimizer: Any, made: Tensor) -> None:
        loss = self.judge(made).square().mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        of_net = torch.optim.SGD(self.net.parameters(), lr=0.1)
        of_judge = torch.optim.SGD(self.judge.parameters(), lr=0.1)
        return [of_net, of_judge]


def test_a_backbone_is_judged_when_its_own_optimizer_steps(tmp_path: Path) -> None:
    module = fit(tmp_path, Adversarial())
    assert adapted_layers(module) == [
        "net.backbone.0",
        "net.backbone.2",
        "net.backbone.4",
        "net.head",
        "judge",
    ]


def test_a_frozen_network_with_adapters_of_its_own_is_merged_first() -> None:
    module = Perceptual()
    config = ll.LoRAConfig(r=2)
    ll.inject_adapters(module.vgg, config)
    module.vgg.requires_grad_(False)
    with pytest.raises(
        ll.AdapterStateError,
        match=r"'vgg' of Perceptual has adapters of its own, and is frozen",
    ):
        ll.inject_adapters(module, config)
    ll.merge_adapters(module.vgg)
    with pytest.warns(ll.LoRAWarning, match="No adapter for 'vgg'"):
        names = ll.inject_adapters(module, config)
    assert names == ("net.0", "net.2", "net.4")


def test_a_copy_that_lags_behind_keeps_its_own_magnitudes() -> None:
    module = Momentum("net")
    for p in module.copy.parameters():
        size = 0.1 * p.abs().mean()
        p.data += size * torch.randn(p.shape)
    before = module.copy(X)
    ll.inject_adapters(module, ll.LoRAConfig(r=2, use_dora=True))
    torch.testing.assert_close(module.copy(X), before)


def names_outside(
    build: str, trains: tuple[str, ...], head_and_last: tuple[str, ...]
) -> list[str]:
    """The adapted layers of a torchvision model that are neither in its head nor in its last block."""
    with torch.device("meta"):
        model = getattr(torchvision.models, build)()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trains))
    names = ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="all"))
    return [name for name in names if not name.startswith(head_and_last)]


@pytest.mark.filterwarnings("ignore:No adapter for:lightning_lora.LoRAWarning")
@pytest.mark.parametrize(
    ("build", "head", "last"),
    [
        ("resnet18", "fc", "layer4."),
        ("mobilenet_v3_large", "classifier", "features.16."),
        ("densenet121", "classifier", "features.denseblock4."),
        ("vit_b_16", "heads", "encoder.layers.encoder_layer_11."),
    ],
)
def test_a_backbone_of_torchvision_is_adapted_below_its_head_and_not_below_its_last_block(
    build: str, head: str, last: str
) -> None:
    assert names_outside(build, (head,), (last, head))
    assert not names_outside(build, (last, head), (last, head))
