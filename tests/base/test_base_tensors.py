"""What is known of a base's tensors is true of their values."""

import torch
from torch import nn

from lightning_lora.base.base_tensors import Base, Change
from lightning_lora.tensors.digests import digest


def test_the_digest_of_a_copy_is_that_of_its_own_dtype() -> None:
    weight = torch.randn(4, 4)
    half = weight.half()
    base = Base()
    base.readings.digests_now({"weight": weight})
    base.readings.note_copied("weight", weight, half)
    assert base.readings.digests_now({"weight": half}) == {"weight": digest(half)}


def test_a_copy_of_the_same_dtype_is_not_read_again() -> None:
    weight = torch.randn(4, 4)
    copied = weight.clone()
    base = Base()
    base.readings.digests_now({"weight": weight})
    base.readings.note_copied("weight", weight, copied)
    assert base.readings.known_digest("weight", copied) == digest(weight)


def test_changes_in_a_module_are_the_models_unless_it_was_merged_into_a_base_of_its_own() -> None:
    part = Base(changes={"weight": Change(digest_now=1, digest_before=2)})
    of_adapted = Base()
    of_merged = Base()
    of_adapted.absorb("part", part, is_merged=False)
    of_merged.absorb("part", part, is_merged=True)
    assert of_adapted.changes == {"part.weight": Change(digest_now=1, digest_before=2)}
    assert of_merged.changes == {}


def test_what_the_user_froze_in_a_merged_model_was_frozen_since_it_learned() -> None:
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    base = Base(required_grad={"weight": True, "bias": False})
    base.note_unmerged({"weight": frozen, "bias": frozen})
    assert base.frozen_since == {"weight"}
    assert base.required_grad == {"weight": False, "bias": False}
