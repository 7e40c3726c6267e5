"""How many layers of small trained networks still look untrained: ``python -m tests.benchmarks.untrained``."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.model.untrained.judge_layers import judge_layers
from lightning_lora.model.view import View

STEPS = (10, 30, 100, 300)


class Block(nn.Module):
    """A residual block without biases, as in torchvision's networks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)
        ]
        self.layers = nn.Sequential(
            convolutions[0], nn.BatchNorm2d(width), nn.ReLU(), convolutions[1]
        )
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.layers(x)))


def plain(width: int = 64) -> nn.Sequential:
    """Four convolutions with biases, and a linear layer, as torch initialises them."""
    layers: list[nn.Module] = []
    for number, inputs in enumerate((1, width, width, width)):
        layers += [
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(2)] if number == 1 else []
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    )


def residual(width: int = 16) -> nn.Sequential:
    """Fifteen convolutions without biases, as torchvision initialises them."""
    first = [
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    model = nn.Sequential(*first, *(Block(width) for _ in range(7)), *last)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "plain, 64 channels": plain,
    "residual, 16 channels": residual,
    "residual, 32 channels": lambda: residual(32),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam, 0.001": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "Adam, 0.0003": lambda model: torch.optim.Adam(model.parameters(), lr=3e-4),
    "Adam, 0.0001": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
    "SGD, 0.01": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
}


def untrained(model: nn.Module) -> tuple[int, int]:
    """Return how many layers look untrained, and how many can be judged."""
    adapted = deepcopy(model)
    inject_adapters(adapted, LoRAConfig(r=2, target_modules="all"))
    judged = judge_layers(View(adapted), except_for=())
    return len(judged.untrained), len(judged.untrained) + len(judged.trained)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, digits: Tensor
) -> Iterator[int]:
    """Train on batches of 64, and stop after each of these numbers of steps."""
    for step in range(1, max(STEPS) + 1):
        batch = torch.randint(0, len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), digits[batch]).backward()
        optimizer.step()
        if step in STEPS:
            yield step


def main() -> None:
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    digits = torch.tensor(labels)
    for model_name, build in MODELS.items():
        for optimizer_name, make in OPTIMIZERS.items():
            torch.manual_seed(0)
            model = build()
            for step in trained(model, make(model), images, digits):
                with torch.no_grad():
                    accuracy = (model(images).argmax(1) == digits).float().mean().item()
                found, judged = untrained(model)
                shown = (
                    f"{model_name}; {optimizer_name}; {step} steps: {accuracy:.0%} "
                    "right"
                )
                print(f"{shown}, {found} of {judged} layers look untrained")


if __name__ == "__main__":
    main()
