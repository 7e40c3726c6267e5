"""What is known of a base's tensors is true of their values."""

import torch
from torch import nn

from lightning_lora.base.after_merge import AfterMerge, WeightAtMerge
from lightning_lora.base.base_tensors import Base, Change
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.seen import Seen


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


def test_changes_in_a_module_are_the_models_unless_it_was_merged_into_a_base_of_its_own() -> (
    None
):
    part = Base(changes={"weight": Change(digest_now=1, digest_before=2)})
    of_adapted = Base()
    of_merged = Base()
    of_adapted.absorb("part", part, is_merged=False)
    of_merged.absorb("part", part, is_merged=True)
    assert of_adapted.changes == {"part.weight": Change(digest_now=1, digest_before=2)}
    assert of_merged.changes == {}


def test_what_the_user_froze_in_a_merged_model_was_frozen_since_it_learned() -> None:
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    base = Base(user_trains={"weight": True, "bias": False})
    base.note_unmerged({"weight": frozen, "bias": frozen})
    assert base.frozen_since == {"weight"}
    assert base.user_trains == {"weight": False, "bias": False}


def test_what_a_part_noted_does_not_replace_what_the_model_knows() -> None:
    model = Base(user_trains={"part.weight": True}, changes={"part.bias": Change(3, 4)})
    part = Base(
        user_trains={"weight": False, "bias": False}, changes={"bias": Change(1, 2)}
    )
    model.absorb("part", part, is_merged=False)
    assert model.user_trains == {"part.weight": True, "part.bias": False}
    assert model.changes == {"part.bias": Change(3, 4)}


def test_whether_a_parameter_trained_before_is_noted_once_and_can_be_corrected() -> (
    None
):
    parameter = nn.Parameter(torch.zeros(2))
    base = Base()
    base.note_user_trains({"weight": parameter})
    parameter.requires_grad_(False)
    base.note_user_trains({"weight": parameter, "bias": parameter})
    assert base.user_trains == {"weight": True, "bias": False}
    base.set_user_trains(["bias"], flag=True)
    assert base.user_trains == {"weight": True, "bias": True}


def test_what_trains_again_is_not_frozen_since() -> None:
    base = Base()
    base.note_frozen_since(["weight", "bias"])
    base.note_thawed_since(["bias"])
    assert base.frozen_since == {"weight"}
    base.forget_frozen_since()
    assert base.frozen_since == set()


def test_what_the_user_thawed_in_a_merged_model_is_not_frozen_since() -> None:
    trains = nn.Parameter(torch.zeros(2))
    base = Base(
        user_trains={"weight": False},
        frozen_since={"weight"},
        after_merge=AfterMerge({"a": Seen(trains)}),
    )
    base.note_unmerged({"weight": trains, "new": trains})
    assert base.frozen_since == set()
    assert base.user_trains == {"weight": True, "new": True}
    assert base.after_merge == AfterMerge()


def test_the_digest_before_is_found_through_a_change_and_the_rounding_below_it() -> (
    None
):
    base = Base()
    base.note_computed_back({"weight": Change(digest_now=2, digest_before=1)})
    base.note_changes(
        {"weight": Change(digest_now=3, digest_before=2), "bias": Change(5, 4)}
    )
    assert base.digests_before_changes({"weight": 3, "bias": 6, "other": 7}) == [
        1,
        6,
        7,
    ]
    base.forget_changes(["weight"])
    assert base.digests_before_changes({"weight": 2, "bias": 5}) == [1, 4]
    base.forget_all_changes()
    assert base.digests_before_changes({"bias": 5}) == [5]


def test_a_file_that_is_loaded_has_the_changed_values_of_the_same_base() -> None:
    loaded = torch.ones(2)
    base = Base(changes={"weight": Change(digest_now=3, digest_before=2)})
    base.note_changes_loaded({"weight": loaded})
    assert base.changes == {"weight": Change(digest(loaded), digest_before=2)}


def test_a_merge_tells_weights_with_an_update_from_others() -> None:
    seen, bias = Seen(torch.zeros(2)), Seen(torch.zeros(1))
    at_merge = WeightAtMerge(seen, torch.ones(2), None, has_other_use=False)
    after_merge = AfterMerge({"bias": bias}, {"layer.weight": at_merge})
    assert after_merge.seen == {"bias": bias, "layer.weight": seen}
    assert after_merge.weights_of("layer", ["weight"]) == {"weight": at_merge}


def test_what_was_kept_for_an_error_does_not_follow_the_base() -> None:
    tensor = torch.zeros(2)
    base = Base()
    before = base.snapshot()
    base.note_user_trains({"weight": nn.Parameter(tensor)})
    base.note_changes({"weight": Change(1, 2)})
    base.note_filled(["buffer"])
    base.note_hidden("weight", tensor, requires_grad=True)
    base.readings.digests_now({"weight": tensor})
    assert (before.user_trains, before.changes, before.filled, before.hidden) == (
        {},
        {},
        set(),
        {},
    )
    assert before.readings.known_digest("weight", tensor) is None
    base.forget_hidden()
    assert base.hidden == {}
