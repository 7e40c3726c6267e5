"""A tensor is read in full once, and again only after a change."""

import pytest
import torch
from torch import Tensor

from lightning_lora.base import readings as readings_module
from lightning_lora.base.readings import HALF_DTYPES, Readings
from lightning_lora.tensors.digests import digest, digests


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that have been read in full so far."""
    found: list[Tensor] = []

    def noted(tensors: list[Tensor], *args: torch.dtype) -> list[int]:
        found.extend(tensors)
        return digests(tensors, *args)

    monkeypatch.setattr(readings_module, "digests", noted)
    return found


def test_only_what_has_changed_is_read_again(read: list[Tensor]) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(3)}
    readings = Readings()
    first = readings.digests_now(tensors)
    assert first == {"a": digest(tensors["a"]), "b": digest(tensors["b"])}
    assert readings.digests_now(tensors) == first
    assert len(read) == 2

    tensors["b"].add_(1)
    assert readings.known_digest("a", tensors["a"]) == first["a"]
    assert readings.known_digest("b", tensors["b"]) is None
    assert readings.digests_now(tensors)["b"] == digest(tensors["b"])
    assert read[2:] == [tensors["b"]]


def test_another_tensor_under_the_same_name_is_read() -> None:
    readings = Readings()
    readings.digests_now({"a": torch.zeros(3)})
    other = torch.ones(3)
    assert readings.known_digest("a", other) is None
    assert readings.digests_now({"a": other}) == {"a": digest(other)}


def test_all_are_read_anew_on_demand_and_lost_names_are_forgotten(
    read: list[Tensor],
) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(3)}
    readings = Readings()
    readings.digests_now(tensors)
    kept = {"a": tensors["a"]}
    assert readings.digests_read_anew(kept) == {"a": digest(tensors["a"])}
    assert len(read) == 3
    assert readings.known_digest("b", tensors["b"]) is None


def test_a_snapshot_does_not_change_with_later_readings() -> None:
    tensor = torch.randn(3)
    readings = Readings()
    before = readings.snapshot()
    readings.digests_now({"a": tensor})
    readings.half_digests_of(digest(tensor), tensor)
    assert before.known_digest("a", tensor) is None
    assert before.known_half_digests(digest(tensor)) == []


def test_halves_are_computed_once_for_the_same_values() -> None:
    tensor = torch.randn(3)
    readings = Readings()
    halves = readings.half_digests_of(digest(tensor), tensor)
    assert halves == [digest(tensor.to(dtype)) for dtype in HALF_DTYPES]
    of_others = torch.zeros(3)
    # known by the digest alone
    assert readings.half_digests_of(digest(tensor), of_others) == halves
    assert readings.known_half_digests(digest(tensor)) == halves


def test_no_message_is_sent_for_tensors_of_one_process() -> None:
    tensor = torch.randn(3)
    readings = Readings()
    readings.compute_half_digests_of_dtensors({digest(tensor): tensor})
    assert readings.known_half_digests(digest(tensor)) == []
