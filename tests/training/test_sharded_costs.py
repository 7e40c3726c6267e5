"""What a sharded run sends and holds beside what FSDP2 does: the adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.parameters import linear_layers
from tests.support.ranks import run_ranks
from tests.support.sharded import InPairs, LitNet, Net, data, lora, trainer_of
from tests.support.traffic import Counts, sizes_of

pytestmark = pytest.mark.processes


def count(
    folder: Path, module: LitNet, callbacks: list[Any], **options: Any
) -> dict[str, Any]:
    """What a process sends in a fit, and holds."""
    counts = Counts(folder / f"{len(callbacks)}")
    t = trainer_of("sharded", folder, [*callbacks, counts], max_epochs=1, **options)
    t.fit(module, data())
    return {
        "batches": counts.batches,
        "saves": counts.saves,
        "end": counts.end,
        "held": counts.held,
    }


def with_adapters(
    folder: Path, kwargs: dict[str, Any] | None = None, **options: Any
) -> list[Any]:
    """Count in each of two processes."""
    callbacks = [lora(**kwargs or {})]
    return run_ranks(count, folder, LitNet(), callbacks, size=2, **options)


def in_four_processes(folder: Path) -> list[Any]:
    """Count in each of four processes, in two pairs."""
    return run_ranks(count, folder, InPairs(), [lora()], size=4, devices=4)


def without_adapters(folder: Path, **options: Any) -> list[Any]:
    return run_ranks(count, folder, LitNet(), [], size=2, **options)


def kinds_in(messages: list[Any]) -> set[str]:
    return {kind for kind, _ in messages}


def messages_of(kind: str, messages: list[Any]) -> list[Any]:
    return [message for message in messages if message[0] == kind]


def test_a_step_sends_the_adapters_once_beside_the_messages_of_fsdp2(
    tmp_path: Path,
) -> None:
    of_all = without_adapters(tmp_path, precision="bf16-true")[1]
    found = with_adapters(tmp_path, precision="bf16-true")[1]
    of_adapters = ("all-reduce", found["held"]["adapters"])
    for batch, plain in zip(found["batches"], of_all["batches"], strict=True):
        gathers = messages_of("all-gather", plain)
        assert batch == [*gathers, of_adapters]


def test_batches_that_only_accumulate_send_no_gradients(tmp_path: Path) -> None:
    kwargs = {"modules_to_save": ["head"]}
    found = with_adapters(tmp_path, kwargs, accumulate_grad_batches=2)[1]
    first, second, third, fourth = found["batches"]
    assert kinds_in(first) == kinds_in(third) == {"all-gather"}
    assert (
        kinds_in(second)
        == kinds_in(fourth)
        == {"all-gather", "reduce-scatter", "all-reduce"}
    )


def test_a_process_holds_its_part_of_the_base_and_all_adapters_as_each_pair_of_four_does(
    tmp_path: Path,
) -> None:
    two = with_adapters(tmp_path)
    four = in_four_processes(tmp_path)
    one = two[0]["held"]
    other = two[1]["held"]
    base = sum(p.nbytes for p in Net().parameters())
    assert one["parameters"] + other["parameters"] == base + 2 * one["adapters"]
    assert one["parameters"] < 0.6 * base + one["adapters"]
    assert one["optimizer"] == 2 * one["adapters"]
    for rank, found in enumerate(four):
        of_its_place = two[rank % 2]
        assert found["batches"][1] == of_its_place["batches"][1]
        assert found["held"] == of_its_place["held"]


def test_frozen_weights_are_never_gathered_for_a_file(tmp_path: Path) -> None:
    found = with_adapters(tmp_path, {"modules_to_save": ["head"]})[1]
    rows = 4  # of the head: three, in two equal parts
    head = [4 * rows * 16, 4 * rows]
    state_of_adamw = [*head, *head]
    # torch's, and those of numpy and Python
    random_states = [2 * torch.get_rng_state().nbytes, 2 * 5020]
    gathered = sorted([*head, *state_of_adamw, *random_states])
    tensors = len(list(Net().parameters()))
    first, later = found["saves"]
    # whether each has changed; once, two digests of 8 bytes
    for save, for_each in ((first, 17), (later, 1)):
        assert sorted(sizes_of(save, "all-gather")) == gathered
        others = [size for kind, size in save if kind != "all-gather"]
        assert sum(others) <= for_each * tensors
        assert len(others) <= 5


def test_a_merge_gathers_each_adapted_weight_once(tmp_path: Path) -> None:
    found = with_adapters(tmp_path, {"merge": "last", "exclude_modules": ["head"]})[1]
    layers = linear_layers(Net().layers)
    sizes = [layer.weight.nbytes for layer in layers.values()]
    assert sorted(sizes_of(found["end"], "all-gather")) == sorted(sizes)
