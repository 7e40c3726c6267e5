"""One job: a task, a method, a learning rate and a seed.

It is trained by a Trainer, and gives one JSON file.
"""

import json
import logging
import re
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, save_adapter

from .methods import METHODS, Method
from .stats import Difference
from .student import Student

Result = dict[str, Any]
FEW = 16  # items of each part with --fast


@dataclass(frozen=True)
class Job:
    """What to train, and how.

    Args:
        task: ``"reviews"``, ``"reviews-100"`` or ``"reviews-1000"`` with as many texts
            to train on, ``"definitions"`` or ``"e2e"``; ``"prompts"``, which is E2E's
            validation alone; or ``"digits-128"`` or ``"digits-896"`` with as many
            images, and the same of the larger network: ``"digits-lite2-128"``.
        method: Its name in methods.py.
        lr: The highest learning rate.
        seed: Of the head, of the adapters and of the order of the data.
        epochs: How often it sees the data.
    """

    task: str
    method: str
    lr: float
    seed: int = 0
    epochs: int = 1

    @property
    def name(self) -> str:
        """The name of its file."""
        method = re.sub(r"\W+", "-", self.method.replace("=", "").replace("+", "plus"))
        epochs = "" if self.epochs == 1 else f"_{self.epochs}epochs"
        return f"{self.task}_{method}_{self.lr:g}_seed{self.seed}{epochs}"

    @property
    def is_of_images(self) -> bool:
        """Whether its model sees images, and not texts."""
        return self.task.startswith("digits")


def nll(result: Result) -> float:
    """Return the mean loss on the validation part: what learning rates are chosen by."""
    losses = result["validation"]["nll"]
    return float(sum(losses) / len(losses))


def mistakes(result: Result) -> float:
    """Return the share of wrong answers on the validation part."""
    correct = result["validation"]["correct"]
    right = sum(correct)
    return float(1 - right / len(correct))


@dataclass(frozen=True)
class Folders:
    """Where things are.

    Args:
        results: One JSON file for each finished job.
        adapters: The trained adapters, for the figures.
        e2e: The E2E data: ``valid.txt`` and ``test.txt``.
    """

    results: Path
    adapters: Path
    e2e: Path


class Results:
    """The finished jobs, in a folder.

    Args:
        folder: Of the JSON files.
        fast: Whether jobs take a little of the data.
    """

    def __init__(self, folder: Path, *, fast: bool = False) -> None:
        self.folder = folder
        self.fast = fast
        self.found: dict[str, Result] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.json"):
            self.found[path.stem] = read(path)
        # by two jobs and what tables compare of them
        self.compared: dict[tuple[str, ...], Difference] = {}

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of a job at its best learning rate."""
        return (0, 1) if self.fast else (0, 1, 2)

    def __contains__(self, job: Job) -> bool:
        return job.name in self.found

    def __getitem__(self, job: Job) -> Result:
        return self.found[job.name]

    def add(self, name: str, result: Result) -> None:
        """Write a result, whole or not at all."""
        path = self.folder / f"{name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, separators=(",", ":")) + "\n")
        part.replace(path)
        self.found[name] = result


def read(path: Path) -> Result:
    """Return a result, after a look whether it is that of its file's name."""
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        is_whole = not result.get("task") or path.stem == job_of(result).name
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise SystemExit(
            f"{path} does not hold the result that its name says. Delete it: then its "
            "job is run again."
        )
    return result


def job_of(result: Result) -> Job:
    """Return the job that a result is of."""
    return Job(
        result["task"], result["method"], result["lr"], result["seed"], result["epochs"]
    )


def run(job: Job, folders: Folders, *, fast: bool) -> Result:
    """Train, evaluate, and return what was found."""
    quiet()
    torch.set_num_threads(1)
    started = time.process_time()
    method = METHODS[job.method]
    module, data, family = build(job, folders, fast)
    result: Result = {**asdict(job), "trained": 0}
    trainer = make_trainer(
        prepare(module, method, family.WEIGHTS), max_epochs=job.epochs
    )
    if not method.shots:
        trainer.fit(module, data.train_dataloader())
        result["trained"] = size_of_parameters(trainer.optimizers[0])
    if method.weights:
        save_adapter(module, folders.adapters / f"{job.name}.safetensors")
    trainer.validate(module, data.val_dataloader(), verbose=False)
    result["validation"] = columns(module.items)
    if job.task == "prompts":
        return result
    trainer.test(module, data.test_dataloader(), verbose=False)
    result["test"] = columns(module.items)
    if job.task == "definitions":
        trainer.test(module, DataLoader(data.fresh, batch_size=None), verbose=False)
        result["fresh"] = columns(module.items)
    if job.task == "e2e":
        result["nist"] = family.nist(result["test"]["text"], data.test)
    # what the image classifier learned before does not come with its package
    if not job.is_of_images:
        result["own"] = family.own_task(module, FEW if fast else None)
        result["own_task"] = mean(*result["own"].values())
    result["seconds"] = round(time.process_time() - started, 1)
    return result


def size_of_parameters(optimizer: Optimizer) -> int:
    """Return how many numbers an optimizer changes."""
    size = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            size += parameter.numel()
    return size


def columns(items: list[Result]) -> dict[str, list[Any]]:
    """Return a list for each key of the items."""
    lists: dict[str, list[Any]] = {key: [] for key in items[0]}
    for item in items:
        for key, values in lists.items():
            values.append(item[key])
    return lists


def build(job: Job, folders: Folders, fast: bool) -> tuple[Any, Any, Any]:
    """Return a job's module and data, and the file that they are from."""
    seed_everything(job.seed, verbose=False)
    limit = FEW if fast else None
    if job.task in ("e2e", "prompts"):
        from . import smollm

        writer = smollm.Writer(job.lr)
        tables = smollm.Tables(folders.e2e, METHODS[job.method], job.seed, limit)
        return writer, tables, smollm
    if job.is_of_images:
        from . import digits

        network = digits.network_of(job.task)
        reader = digits.Reader(network, job.lr, METHODS[job.method].momentum)
        return reader, digits.images(job.task, limit), digits
    from . import minilm

    classifier = minilm.Classifier(minilm.CLASSES[job.task], job.lr)
    return classifier, minilm.texts(job.task, limit), minilm


def prepare(module: Student, method: Method, weights: dict[str, str]) -> list[Callback]:
    """Set what trains and how, and return the callbacks of a method."""
    module.preconditioned = method.preconditioned
    if method.weights is None:
        thaw(module.get_submodule("pretrained"), method.trains)
        if method.prefix:
            module.pretrained = with_prefix(module.pretrained, method.prefix)
        return []
    saved = ["head"] if hasattr(module, "head") else []
    targets: str | list[str]
    if method.weights == "all":
        targets = weights["all"]
    elif method.weights == "embedding":
        targets = "all"
    elif method.weights == "norms":
        targets = weights["all"]
        saved += weights["norms"].split()
    elif method.weights == "everything":
        targets = "all"
        saved += weights["norms"].split()
    else:
        targets = [weights[name] for name in method.weights]
    return [LoRACallback(target_modules=targets, modules_to_save=saved, **method.lora)]


def thaw(model: nn.Module, what: str) -> None:
    """Let ``"all"`` weights, ``"biases"`` or ``"nothing"`` of a model train."""
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias")
        parameter.requires_grad_(what == "all" or (what == "biases" and is_bias))


def with_prefix(model: Any, tokens: int) -> Any:
    """Return the model with a prefix to train, by peft."""
    from peft import PrefixTuningConfig, get_peft_model  # no other method needs it

    config = PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=tokens
    )
    return get_peft_model(model, config)


def make_trainer(callbacks: list[Callback], **more: Any) -> Trainer:
    """Return a Trainer that writes nothing."""
    off = dict.fromkeys(
        (
            "logger",
            "enable_checkpointing",
            "enable_model_summary",
            "enable_progress_bar",
        ),
        False,
    )
    return Trainer(accelerator="cpu", callbacks=callbacks, **off, **more)  # type: ignore[arg-type]


def quiet() -> None:
    """Leave out the messages of the libraries: one bar shows all jobs."""
    # not before a mistake in the arguments is told: this takes long
    import transformers

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    reports: Any = transformers.logging
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    for message in (
        ".*does not have many workers",
        ".*in eval mode at the start",
        ".*no `val_dataloader`",
        ".*LeafSpec",
    ):
        warnings.filterwarnings("ignore", message=message)
