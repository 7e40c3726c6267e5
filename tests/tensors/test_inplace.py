"""An object with another class is the same object, also when it is copied or pickled."""

import copy
import pickle

from torch import nn

from lightning_lora.tensors.inplace import (
    InPlace,
    class_names,
    combined,
    is_overlaid,
    original_class,
    overlay,
    uncover,
)


class Loud(InPlace):
    """Says more."""

    overlaid_prefix = "Loud"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}!"  # type: ignore[misc]


def test_a_class_is_changed_in_place_and_given_back() -> None:
    layer = nn.Linear(2, 3)
    overlay(layer, Loud)
    loud: object = layer
    assert isinstance(loud, Loud)
    assert (type(layer).__name__, type(layer).__doc__) == ("LoudLinear", "Says more.")
    assert layer.extra_repr() == "in_features=2, out_features=3, bias=True!"
    assert is_overlaid(loud)
    assert original_class(layer) is nn.Linear
    uncover(loud)
    assert type(layer) is nn.Linear
    assert original_class(layer) is nn.Linear


def test_a_pair_of_classes_has_one_combined_class() -> None:
    assert combined(Loud, nn.Linear) is combined(Loud, nn.Linear)
    assert combined(Loud, nn.Linear) is not combined(Loud, nn.Bilinear)


def test_copies_and_pickles_have_the_same_class() -> None:
    layer = nn.Linear(2, 3)
    overlay(layer, Loud)
    for other in (
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ):
        assert type(other) is type(layer)
        assert other.weight.tolist() == layer.weight.tolist()


def test_a_class_that_other_code_has_changed_is_noticed() -> None:
    layer = nn.Linear(2, 3)
    overlay(layer, Loud)
    loud = combined(Loud, nn.Linear)
    layer.__class__ = type("More", (loud,), {})
    assert isinstance(layer, InPlace)
    assert not is_overlaid(layer)


def test_the_names_of_all_ancestors() -> None:
    assert class_names(nn.Linear(1, 1)) == {"Linear", "Module", "object"}
