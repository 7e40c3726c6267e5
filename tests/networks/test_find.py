"""What stands still beside networks that train, and what copies them."""

import copy

from torch import nn

from lightning_lora.networks.copies import find_copies
from lightning_lora.networks.find import find_networks
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.tensors.names import modules_by_name, parameters_by_name


def blocks() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return nn.Sequential(block, copy.deepcopy(block))  # alike, as those of a new encoder of torch


LAYERS = {"net.0.0", "net.0.1", "net.1.0", "net.1.1"}


def test_a_copy_is_found_as_a_whole_and_not_block_by_block() -> None:
    net = blocks()
    average = copy.deepcopy(net)
    model = nn.ModuleDict({"net": net, "average": average})
    layers = {*LAYERS, *[name.replace("net", "average") for name in LAYERS]}
    found = find_copies(modules_by_name(model), parameters_by_name(model), layers, set(average.parameters()))
    assert found == {"average": "net"}


def test_of_several_networks_that_are_alike_each_has_a_copy_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    names = ("one", "other", "copy of one", "copy of other")
    model = nn.ModuleDict({name: copy.deepcopy(net) for name in names})
    layers = {f"{name}.0" for name in names}
    still = {*model["copy of one"].parameters(), *model["copy of other"].parameters()}
    found = find_copies(modules_by_name(model), parameters_by_name(model), layers, still)
    assert found == {"copy of one": "one", "copy of other": "other"}


def test_an_embedding_that_trains_is_no_network_beside_what_stands_still() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(20, 8), "net": blocks()})
    still = set(model["net"].parameters())
    found = find_networks(modules_by_name(model), parameters_by_name(model), {"words", *LAYERS}, still)
    assert found == StillNetworks()
