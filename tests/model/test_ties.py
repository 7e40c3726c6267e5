"""A weight that is tied to another layer's, from its merge to its base again."""

import pytest
from torch import nn

import lightning_lora as ll
from tests.support.models import TinyLM, randomise, unties


def merged_head() -> TinyLM:
    """A model whose head is adapted and merged.

    Its weight was tied to the embedding's.
    """
    model = TinyLM()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["lm_head"]))
    randomise(model)
    ll.merge_adapters(model)
    return model


@unties
@pytest.mark.parametrize("trains", [True, False])
def test_what_the_user_froze_in_a_merged_model_is_frozen_where_it_is_tied_again(
    trains: bool,
) -> None:
    model = merged_head()
    model.lm_head.weight.requires_grad_(trains)
    ll.unmerge_adapters(model)
    ll.remove_adapters(model)
    assert model.lm_head.weight is model.embed.weight
    assert model.embed.weight.requires_grad is trains


@unties
def test_what_the_user_froze_in_one_use_is_frozen_in_both_where_the_embedding_is_adapted() -> (
    None
):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    ll.merge_adapters(model)
    model[0].weight.requires_grad_(False)  # type: ignore[operator,union-attr]
    ll.unmerge_adapters(model)
    ll.remove_adapters(model)
    assert model[0].weight is model[1].weight
    assert not model[0].weight.requires_grad


@unties
def test_a_merge_is_not_undone_onto_an_embedding_that_was_changed_since() -> None:
    model = merged_head()
    model.embed.weight.data.mul_(2)  # the base of the head
    with pytest.raises(
        ll.AdapterStateError, match="were changed since its adapters were merged"
    ):
        ll.unmerge_adapters(model)


def test_a_tied_weight_that_one_adapter_trains_stays_one_where_another_is_active() -> (
    None
):
    model = TinyLM()
    ll.inject_adapters(
        model,
        ll.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed"]),
        name="one",
    )
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, target_modules=["q_proj"]), name="other"
    )
    assert model.lm_head.weight is model.embed.weight
    ll.set_adapter(model, "one")
    assert model.lm_head.weight is model.embed.weight
