"""What is compared: full fine-tuning, adapters on some weights, biases only, the head only."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Args:
        rates: The learning rates to try, by factors of two.
        trains: ``"all"`` weights, ``"biases"`` or ``"nothing"`` of the pretrained
            model. A new head always trains.
        weights: The weights that get adapters: some of q, k, v and o, ``"all"`` linear
            layers; or with ``"embedding"``, these and the table of words. With
            ``"everything"``, biases and norms train in full beside both; with
            ``"norms"``, norms beside ``"all"``. None: no adapters.
        lora: More arguments of LoRACallback.
        prefix: Trained tokens that peft puts before the keys and values of each layer.
            All others are frozen.
        shots: Examples in the prompt, in place of training.
        chat: Whether that prompt is a talk with the model, by its chat template.
        momentum: Of BatchNorm's running statistics. None: BatchNorm keeps those of the
            pretrained model.
        preconditioned: Whether the gradient of A depends on the size of B, and that of
            B on the size of A.
    """

    rates: tuple[float, ...]
    trains: str = "nothing"
    weights: str | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    prefix: int = 0
    shots: int = 0
    chat: bool = False
    momentum: float | None = None
    preconditioned: bool = False


def lora(weights: str, r: int, **more: Any) -> Method:
    """Return the method that trains adapters of rank ``r``."""
    return Method(
        (1e-3, 2e-3, 4e-3), weights=weights, lora={"r": r, "alpha": 8, **more}
    )


MAIN = {
    "full": Method((5e-5, 1e-4, 2e-4), trains="all"),
    "LoRA q v, r=8": lora("qv", 8),
    "LoRA all, r=8": lora("all", 8),
    "LoRA all, r=16": lora("all", 16),
    "BitFit": Method((1e-3, 2e-3, 4e-3), trains="biases"),
    "probe": Method((5e-3, 1e-2, 2e-2)),
}
DEFINITIONS = ("full", "LoRA q v, r=8", "LoRA all, r=8", "probe")
BEYOND = {
    "LoRA+ all, r=8": lora("all", 8, lr_scale={"A": 0.125, "B": 2}),
    "DoRA all, r=8": lora("all", 8, use_dora=True),
    "LoRA all, r=8, dropout 0.1": lora("all", 8, dropout=0.1),
}
EVERYTHING = {"LoRA everything, r=8": lora("everything", 8, bias="all")}
EMBEDDING = {"LoRA all + embedding, r=8": lora("embedding", 8)}
LARGER = {
    "LoRA all + embedding, r=32": Method(
        (2e-3, 4e-3), weights="embedding", lora={"r": 32, "alpha": 8}
    )
}
ONCE = {  # of which one seed is trained, at one rate
    "LoRA all, r=8, preconditioned": Method(
        (2e-3,), weights="all", lora={"r": 8}, preconditioned=True
    )
}
VARIANTS = {  # where the adapters start, and a head that keeps the module's rate
    "LoRA all, r=8, EVA": lora("all", 8, init="eva"),
    "LoRA all, r=8, LoRA-GA": lora("all", 8, init="lora_ga"),
    "LoRA all, r=8, lr_scale=10": Method(
        (1e-4, 2e-4, 4e-4), weights="all", lora={"r": 8, "lr_scale": 10}
    ),
}
WHOLE = {  # a rank so high that it can be full fine-tuning
    "LoRA everything, r=384": Method(
        (2e-3, 4e-3), weights="everything", lora={"r": 384, "bias": "all"}
    )
}
ONE_SEED = ("LoRA all, r=8", *ONCE)  # what these are compared with, by one seed
PREFIX = {"prefix, 10 tokens": Method((5e-3, 1e-2, 2e-2), prefix=10)}
FEW = ("full", "LoRA all, r=8", *EMBEDDING, *EVERYTHING, "probe")
# of the tasks with so many texts to train on
FEW_EPOCHS = {"reviews-100": 20, "reviews-1000": 6}
EPOCHS = ("full", "LoRA all, r=8", *EMBEDDING, *EVERYTHING)
PROMPTS: dict[str, Method] = {}
for shots in (1, 5, 10):
    PROMPTS[f"{shots}-shot"] = Method((0.0,), shots=shots)
    PROMPTS[f"{shots}-shot, chat"] = Method((0.0,), shots=shots, chat=True)
E2E = {
    "5-shot": PROMPTS["5-shot"],
    "full": MAIN["full"],
    "LoRA q v, r=4": lora("qv", 4),
    "LoRA all, r=8": lora("all", 8),
    **EVERYTHING,
}

# Which weights, for about the same number of parameters; and which rank.
WHICH: dict[str, Method] = {}
for weights in ("q", "k", "v", "o", "qk", "qv", "qkvo"):
    rank = 8 // len(weights)
    WHICH[f"LoRA {' '.join(weights)}, r={rank}"] = lora(weights, rank)
RANKS = {f"LoRA q v, r={r}": lora("qv", r) for r in (1, 2, 4, 8, 64)}
# of these two: the best one of "LoRA q v, r=8" after one epoch; with alpha = 8, ranks
# hardly change it
RATE = 4e-3

# The three scalings are one at r=8: what differs is how they follow the rank.
GRID_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
GRID_RANKS = (2, 8, 32)
SCALINGS: dict[str, dict[str, Any]] = {
    "alpha = r": {"alpha": None},
    "alpha = 8": {},
    "rsLoRA": {"alpha": 8**0.5, "use_rslora": True},
}


def grid_name(r: int, scaling: str) -> str:
    """Return the name of a method of the grid."""
    if r == 8 or scaling == "alpha = 8":
        return f"LoRA all, r={r}"
    return f"LoRA all, r={r}, {scaling}"


GRID: dict[str, Method] = {}
for scaling, arguments in SCALINGS.items():
    for rank in GRID_RANKS:
        GRID[grid_name(rank, scaling)] = lora("all", rank, **arguments)

# Images, where norms have running statistics. How fast these follow the batches changes
# what an evaluation uses, and nothing of the training: so the learning rate is searched
# with the first momentum alone.
# of the tasks with so many images to train on
DIGITS_EPOCHS = {"digits-128": 12, "digits-896": 3}
# the same for a larger network, whose norms stay frozen
LITE2_EPOCHS = {"digits-lite2-128": 12, "digits-lite2-896": 3}
MOMENTA = (0.1, 0.01, 0.3)  # that of torch, of the network's package, and a faster one
MOMENTUM_OF_PACKAGE = 0.01
FROZEN_NORMS = {
    "probe": MAIN["probe"],
    "LoRA all, r=8": MAIN["LoRA all, r=8"],
    "full, frozen statistics": Method((5e-4, 1e-3, 2e-3), trains="all"),
}
TRAINED_NORMS = ("LoRA all + norms, r=8", "full")


def with_momentum(name: str, momentum: float) -> str:
    """Return the name of a method whose norms train."""
    return f"{name}, momentum {momentum:g}"


DIGITS = dict(FROZEN_NORMS)
for momentum in MOMENTA:
    adapted = lora("norms", 8)
    full = DIGITS["full, frozen statistics"]
    DIGITS[with_momentum("LoRA all + norms, r=8", momentum)] = replace(
        adapted, momentum=momentum
    )
    DIGITS[with_momentum("full", momentum)] = replace(full, momentum=momentum)

METHODS = {
    **GRID,
    **MAIN,
    **BEYOND,
    **EMBEDDING,
    **LARGER,
    **ONCE,
    **EVERYTHING,
    **VARIANTS,
    **WHOLE,
    **PREFIX,
    **PROMPTS,
    **E2E,
    **WHICH,
    **RANKS,
    **DIGITS,
}
