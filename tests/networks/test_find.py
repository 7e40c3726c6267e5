"""What stands still beside networks that train, and what copies them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.networks.copies import find_copies, pairs_of
from lightning_lora.networks.find import find_networks
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.tensors.names import modules_by_name, parameters_by_name


def blocks() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    # alike, as those of a new encoder of torch
    return nn.Sequential(block, copy.deepcopy(block))


LAYERS = {"net.0.0", "net.0.1", "net.1.0", "net.1.1"}


def test_a_copy_is_found_as_a_whole_and_not_block_by_block() -> None:
    net = blocks()
    average = copy.deepcopy(net)
    model = nn.ModuleDict({"net": net, "average": average})
    layers = {*LAYERS, *[name.replace("net", "average") for name in LAYERS]}
    found = find_copies(
        modules_by_name(model),
        parameters_by_name(model),
        layers,
        set(average.parameters()),
    )
    assert found == {"average": "net"}


def test_of_several_networks_that_are_alike_each_has_a_copy_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    names = ("one", "other", "copy of one", "copy of other")
    model = nn.ModuleDict({name: copy.deepcopy(net) for name in names})
    layers = {f"{name}.0" for name in names}
    still = parameters_in(model, "copy of one", "copy of other")
    found = find_copies(
        modules_by_name(model), parameters_by_name(model), layers, still
    )
    assert found == {"copy of one": "one", "copy of other": "other"}


def test_an_embedding_that_trains_is_no_network_beside_what_stands_still() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(20, 8), "net": blocks()})
    still = set(model["net"].parameters())
    found = find_networks(
        modules_by_name(model), parameters_by_name(model), {"words", *LAYERS}, still
    )
    assert found == StillNetworks()


def found(
    model: nn.Module, layers: set[str], still: set[nn.Parameter], **more: Any
) -> StillNetworks:
    return find_networks(
        modules_by_name(model), parameters_by_name(model), layers, still, **more
    )


def stack(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(size, size) for size in sizes])


def networks(**depths: int) -> nn.ModuleDict:
    """Networks of so many layers, by name."""
    made = {name: stack(*[8] * depth) for name, depth in depths.items()}
    return nn.ModuleDict(made)


def parameters_in(model: nn.ModuleDict, *names: str) -> set[nn.Parameter]:
    """The parameters of some networks."""
    found: set[nn.Parameter] = set()
    for name in names:
        found.update(model[name].parameters())
    return found


def layers_of(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in modules_by_name(model).items()
        if isinstance(module, nn.Linear)
    }


def test_a_teacher_stands_still_beside_its_student() -> None:
    model = networks(student=3, teacher=3)
    still = parameters_in(model, "teacher")
    assert found(model, layers_of(model), still) == StillNetworks(
        beside_training=("teacher",)
    )


@pytest.mark.parametrize(
    "sizes", [(64, 64), (4, 4, 4)], ids=["two layers", "a small share"]
)
def test_an_encoder_stands_still_under_a_head(sizes: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"encoder": stack(8, 8, 8, 8), "head": stack(*sizes)})
    still = set(model["encoder"].parameters())
    assert found(model, layers_of(model), still) == StillNetworks(
        under_head=("encoder",)
    )


def test_later_blocks_that_train_are_no_head() -> None:
    model = stack(8, 8, 8, 8)
    still = set(model[:3].parameters())
    assert found(model, layers_of(model), still) == StillNetworks(
        beside_training=("0", "1", "2")
    )


def test_a_new_head_that_trains_alone_has_an_encoder_under_it() -> None:
    model = networks(encoder=3, head=3)
    still = parameters_in(model, "encoder")
    still_networks = found(
        model, layers_of(model), still, find_untrained=lambda: ["head"]
    )
    assert still_networks == StillNetworks(under_head=("encoder",))


def test_what_trains_and_would_get_no_adapter_makes_no_teacher() -> None:
    model = networks(encoder=3, head=3)
    still = parameters_in(model, "encoder")
    encoder_alone = {name for name in layers_of(model) if name.startswith("encoder")}
    assert found(model, encoder_alone, still) == StillNetworks(under_head=("encoder",))


def test_without_anything_that_trains_no_network_is_told_from_another() -> None:
    model = networks(one=1, other=1)
    assert found(model, layers_of(model), set(model.parameters())) == StillNetworks()
    assert found(model, layers_of(model), set()) == StillNetworks()


def test_a_named_head_leaves_an_encoder_under_it() -> None:
    model = nn.ModuleDict({"encoder": stack(8, 8), "head": nn.Linear(8, 2)})
    still = set(model.parameters())
    still_networks = found(
        model, {"encoder.0", "encoder.1"}, still, named_by_user=["head"]
    )
    assert still_networks == StillNetworks(under_head=("encoder",))


def test_what_was_found_as_a_copy_is_no_other_network() -> None:
    model = networks(net=3, average=3, teacher=3)
    still = parameters_in(model, "average", "teacher")
    copies = {"average": "net"}
    known = StillNetworks(copies=copies)
    still_networks = found(model, layers_of(model), still, known=known)
    assert still_networks == StillNetworks(beside_training=("teacher",), copies=copies)


def test_beside_a_known_teacher_nothing_that_trains_makes_no_head() -> None:
    model = networks(student=3, teacher=3)
    known = StillNetworks(beside_training=("teacher",))
    still = set(model.parameters())
    assert found(model, layers_of(model), still, known=known) == known


def test_a_known_teacher_is_in_no_network_that_is_found() -> None:
    model = nn.ModuleDict(
        {"nets": networks(student=3, teacher=3), "head": nn.Linear(8, 2)}
    )
    known = StillNetworks(beside_training=("nets.teacher",))
    still = set(model["nets"].parameters())
    still_networks = found(model, layers_of(model), still, known=known)
    assert still_networks == StillNetworks(
        beside_training=("nets.teacher",), under_head=("nets.student",)
    )


def test_layers_of_copies_whose_originals_have_no_adapter_are_bare() -> None:
    still_networks = StillNetworks(
        beside_training=("teacher",), copies={"average": "net", "other": "teacher"}
    )
    layers = {"net.0", "average.0", "average.1", "teacher.0", "other.0"}
    found = still_networks.with_bare_layers(layers)
    assert found.bare_layers == ("average.1", "other.0")
    assert found.without_adapters == ("teacher", "average.1", "other.0")
    assert found.originals_of(["average.0", "net.0"]) == {"average.0": "net.0"}


def copies_in(model: nn.ModuleDict, still: str, **more: bool) -> dict[str, str]:
    modules, parameters = modules_by_name(model), parameters_by_name(model)
    return find_copies(
        modules, parameters, layers_of(model), set(model[still].parameters()), **more
    )


def test_an_average_that_lags_behind_is_a_copy_and_other_weights_are_none() -> None:
    torch.manual_seed(0)
    net = stack(32, 32)
    lagging, other = copy.deepcopy(net), stack(32, 32)
    with torch.no_grad():
        for parameter in lagging.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    assert copies_in(nn.ModuleDict({"net": net, "still": lagging}), "still") == {
        "still": "net"
    }
    assert copies_in(nn.ModuleDict({"net": net, "still": other}), "still") == {}


def test_a_copy_may_lack_a_parameter_only_where_that_is_allowed() -> None:
    net = stack(8, 8)
    lacking = copy.deepcopy(net)
    lacking[1].bias = None
    model = nn.ModuleDict({"net": net, "still": lacking})
    assert copies_in(model, "still") == {}
    assert copies_in(model, "still", may_be_smaller=True) == {"still": "net"}


def test_small_weights_are_compared_too_and_equal_biases_make_no_copy() -> None:
    net = stack(8, 8)
    other = stack(8, 8)
    for layer in (*net, *other):
        nn.init.zeros_(layer.bias)
        layer.weight.data *= 0.01
        layer.bias.data += 1
    same = nn.ModuleDict({"net": net, "still": copy.deepcopy(net)})
    assert copies_in(same, "still") == {"still": "net"}
    differing = nn.ModuleDict({"net": net, "still": other})
    assert copies_in(differing, "still") == {}


def test_another_class_is_no_copy() -> None:
    class Other(nn.Sequential):
        pass

    net = stack(8, 8)
    model = nn.ModuleDict({"net": net, "still": Other(*copy.deepcopy(net))})
    assert copies_in(model, "still") == {}


def test_one_layer_is_a_copy_beside_what_trains_and_not_inside_what_stands_still() -> (
    None
):
    layer = nn.Linear(8, 8)
    beside = nn.ModuleDict({"net": layer, "still": copy.deepcopy(layer)})
    assert copies_in(beside, "still") == {"still": "net"}
    inside = nn.ModuleDict(
        {"net": layer, "still": nn.ModuleDict({"part": copy.deepcopy(layer)})}
    )
    assert copies_in(inside, "still") == {}


def test_pairs_are_named_as_in_messages() -> None:
    assert pairs_of({"a": "b", "c": "d"}) == "'a' of 'b', 'c' of 'd'"
