"""Which frozen networks are backbones: those from whose outputs is computed what trains.

The first step tells.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.private import NODE_FUNCTION, tree_leaves
from lightning_lora.tensors.dicts import only, where, without
from lightning_lora.tensors.graphs import nodes_behind
from lightning_lora.tensors.names import names_inside, names_outside, owner_of
from lightning_lora.tensors.values import is_tensor
from lightning_lora.training.steps.reentrant import CHECKPOINT_FUNCTION


@dataclass(eq=False)
class WatchedNetwork:
    """A frozen network under a head, in the first step."""

    parameters: set[nn.Parameter] = field(default_factory=set)
    """Those of its adapters that train."""

    has_run: bool = False

    may_be_read: bool = False
    """Whether inputs of what trains were computed from it, or nobody can know."""


@dataclass(frozen=True)
class Judged:
    """The names of frozen networks, by what they have turned out to be."""

    backbones: list[str] = field(default_factory=list)

    others: list[str] = field(default_factory=list)
    """Networks from which nothing that trains is computed."""


class Backbones:
    """Watches frozen networks in the first step, to tell which are backbones.

    The inputs of a head are computed from its backbone: the parameters of the
    backbone's adapters are in the graphs behind these inputs. Nothing that trains is
    computed from a teacher, or from a network in the loss. So the frozen networks under
    a head are watched, and what trains beside them.
    """

    def __init__(self, trainer: Trainer, view: View) -> None:
        self.trainer = trainer
        self.unjudged: dict[str, WatchedNetwork] = {}
        self.what_trains_has_run = False
        self.hooks: list[RemovableHandle] = []
        for name in view.adapter.networks.under_head:
            self.unjudged[name] = self._watch_network(view, name)
        if self.unjudged:
            self._watch_what_trains(view)

    def _watch_network(self, view: View, name: str) -> WatchedNetwork:
        """Note when a layer of a frozen network runs."""
        network = WatchedNetwork()
        note_run = partial(self._note_run, network)
        for layer_name in names_inside(view.layers, [name]):
            layer = view.layers[layer_name]
            network.parameters.update(layer.lora_trainable())
            self.hooks.append(layer.register_forward_pre_hook(note_run))
        return network

    def _note_run(self, network: WatchedNetwork, *_: Any) -> None:
        if self.trainer.training:  # in a validation of the fit, all may run
            network.has_run = True

    def _watch_what_trains(self, view: View) -> None:
        """Look at the inputs of what trains beside the frozen networks."""
        training = _modules_that_train(view, self.unjudged)
        if not training:
            # a head without an adapter trains alone
            training = _modules_without_adapters(view)
        for module in training:
            self.hooks.append(
                module.register_forward_pre_hook(self._look_at_inputs, with_kwargs=True)
            )

    def _look_at_inputs(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.what_trains_has_run = True
        networks = self.unjudged.values()
        # no input can come from a network that has not run yet
        if not any(network.has_run for network in networks):
            return
        leaves = _leaves_behind(tree_leaves((args, kwargs)))
        for network in networks:
            if leaves is None or leaves & network.parameters:
                network.may_be_read = True

    def judge(self, names: Iterable[str], is_agreed: Callable[[bool], bool]) -> Judged:
        """Judge those of these networks that can be judged now. Each is judged once.

        A network must have run, and so must what trains, in all processes: until then,
        it waits for another step. A network that is read in one process is a backbone
        in all. ``is_agreed`` says whether something is true in all processes.
        """
        judged = Judged()
        for name in names:
            network = self.unjudged[name]
            if not is_agreed(self.what_trains_has_run and network.has_run):
                continue
            if is_agreed(not network.may_be_read):
                judged.others.append(name)
            else:
                judged.backbones.append(name)
            del self.unjudged[name]
        return judged

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()


def _modules_that_train(view: View, networks: Collection[str]) -> set[nn.Module]:
    """What trains beside these networks: adapted layers, and modules in full."""
    layers_beside = only(view.layers, names_outside(view.layers, networks))
    adapted = where(layers_beside, LoRALayer.lora_trains)
    training: set[nn.Module] = set(adapted.values())
    for module in view.saved_modules:
        training.update(module.modules())
    return training


def _modules_without_adapters(view: View) -> set[nn.Module]:
    """The modules without adapters that have weights which the user has not frozen."""
    owners = set(map(owner_of, without(view.base_parameters, view.frozen_by_user)))
    return set(only(view.modules, owners - view.layers.keys()).values())


def _leaves_behind(values: Iterable[object]) -> set[Tensor] | None:
    """The parameters from which these values were computed, or which are among them.

    None: they cannot be known, because a reentrant checkpoint has computed some values.
    It makes its graph in the backward pass.
    """
    tensors = list(filter(is_tensor, values))
    leaves = set(tensors)
    for node in nodes_behind(tensors):
        if issubclass(getattr(type(node), NODE_FUNCTION, object), CHECKPOINT_FUNCTION):
            return None
        leaf = getattr(node, "variable", None)  # only nodes of leaves have one
        if is_tensor(leaf):
            leaves.add(leaf)
    return leaves
