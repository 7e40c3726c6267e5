"""What a sharded run sends and holds beside what FSDP2 does: the adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.ranks import run_ranks
from tests.support.sharded import InPairs, LitNet, Net, data, lora, trainer_of
from tests.support.traffic import Counts, sizes_of

pytestmark = pytest.mark.processes


def count(kind: str, folder: Path, *, adapted: bool = True, kwargs: Any = None, **options: Any) -> dict[str, Any]:
    counts = Counts(folder / f"{adapted}")
    callbacks = [lora(**kwargs or {}), counts] if adapted else [counts]
    module = InPairs() if options.get("devices") == 4 else LitNet()
    trainer_of(kind, folder, callbacks, max_epochs=1, **options).fit(module, data())
    return {name: getattr(counts, name) for name in ("batches", "saves", "end", "held")}


def counted(kind: str, folder: Path, **options: Any) -> list[Any]:
    """Count in each process: two, or four in two pairs."""
    return run_ranks(count, kind, folder, size=options.get("devices", 2), **options)


def test_a_step_sends_the_adapters_once_beside_the_messages_of_fsdp2(tmp_path: Path) -> None:
    of_all = counted("sharded", tmp_path, adapted=False, precision="bf16-true")[1]
    found = counted("sharded", tmp_path, precision="bf16-true")[1]
    for batch, plain in zip(found["batches"], of_all["batches"], strict=True):
        gathers = [message for message in plain if message[0] == "all-gather"]
        assert batch == [*gathers, ("all-reduce", found["held"]["adapters"])]


def test_batches_that_only_accumulate_send_no_gradients(tmp_path: Path) -> None:
    kwargs = {"modules_to_save": ["head"]}
    batches = counted("sharded", tmp_path, kwargs=kwargs, accumulate_grad_batches=2)[1]["batches"]
    kinds = [{kind for kind, _ in batch} for batch in batches]
    assert kinds == [{"all-gather"}, {"all-gather", "reduce-scatter", "all-reduce"}] * 2


def test_a_process_holds_its_part_of_the_base_and_all_adapters_as_each_pair_of_four_does(tmp_path: Path) -> None:
    two, four = counted("sharded", tmp_path), counted("sharded", tmp_path, devices=4)
    one, other = (found["held"] for found in two)
    base = sum(p.nbytes for p in Net().parameters())
    assert one["parameters"] + other["parameters"] == base + 2 * one["adapters"]
    assert one["parameters"] < 0.6 * base + one["adapters"]
    assert one["optimizer"] == 2 * one["adapters"]
    for rank, found in enumerate(four):
        assert found["batches"][1] == two[rank % 2]["batches"][1]
        assert found["held"] == two[rank % 2]["held"]


def test_frozen_weights_are_never_gathered_for_a_file(tmp_path: Path) -> None:
    first, later = counted("sharded", tmp_path, kwargs={"modules_to_save": ["head"]})[1]["saves"]
    rows = 4  # of the head: three, in two equal parts
    head = [4 * rows * 16, 4 * rows]
    random_states = [2 * torch.get_rng_state().nbytes, 2 * 5020]  # torch's, and those of numpy and Python
    tensors = len(list(Net().parameters()))
    for save, for_each in ((first, 17), (later, 1)):  # whether each has changed; once, two digests of 8 bytes
        assert sorted(sizes_of(save, "all-gather")) == sorted([*head, *head, *head, *random_states])  # AdamW has two
        others = [size for kind, size in save if kind != "all-gather"]
        assert sum(others) <= for_each * tensors and len(others) <= 5


def test_a_merge_gathers_each_adapted_weight_once(tmp_path: Path) -> None:
    end = counted("sharded", tmp_path, kwargs={"merge": "last", "exclude_modules": ["head"]})[1]["end"]
    adapted = [module.weight for module in Net().layers.modules() if isinstance(module, nn.Linear)]
    assert sorted(sizes_of(end, "all-gather")) == sorted(weight.nbytes for weight in adapted)
