"""Which frozen networks are backbones: those from whose outputs is computed what trains.

The first step tells.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.private import NODE_FUNCTION, tree_leaves
from lightning_lora.tensors.dicts import only, where, without
from lightning_lora.tensors.graphs import nodes_behind
from lightning_lora.tensors.names import names_inside, names_outside, owner_of
from lightning_lora.tensors.values import is_tensor
from lightning_lora.training.steps.reentrant import CHECKPOINT_FUNCTION

# stands for whatever a reentrant checkpoint has computed: its graph is made in the
# backward pass
_UNKNOWN = 0


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
        # the frozen networks, each with the ids of its adapters' parameters
        self.unjudged: dict[str, set[int]] = {}
        self.networks_run: set[str] = set()
        self.what_trains_has_run = False
        # the ids of parameters from which inputs of what trains were computed
        self.leaves_read: set[int] = set()
        self.hooks: list[RemovableHandle] = []
        for network in view.adapter.networks.under_head:
            self._watch_network(view, network)
        if self.unjudged:
            self._watch_what_trains(view)

    def _watch_network(self, view: View, network: str) -> None:
        """Note when a layer of a frozen network runs."""
        parameters = self.unjudged[network] = set()
        for name in names_inside(view.layers, [network]):
            layer = view.layers[name]
            parameters.update(map(id, layer.lora_trainable()))
            self.hooks.append(
                layer.register_forward_pre_hook(partial(self._note_run, network))
            )

    def _note_run(self, network: str, *_: Any) -> None:
        if self.trainer.training:  # in a validation of the fit, all may run
            self.networks_run.add(network)

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
        # no input can come from a network that has not run yet
        if not self.networks_run.isdisjoint(self.unjudged):
            self.leaves_read |= _leaves_behind(tree_leaves((args, kwargs)))

    def judge(
        self, networks: Iterable[str], is_agreed: Callable[[bool], bool]
    ) -> Judged:
        """Judge those of these networks that can be judged now. Each is judged once.

        A network must have run, and so must what trains, in all processes: until then,
        it waits for another step. ``is_agreed`` says whether something is true in all
        processes.
        """
        judged = Judged()
        for name in networks:
            if not is_agreed(self._have_both_run(name)):
                continue
            if is_agreed(self._is_read_by_nothing(name)):
                judged.others.append(name)
            else:
                judged.backbones.append(name)
            del self.unjudged[name]
        return judged

    def _have_both_run(self, network: str) -> bool:
        """Whether a network and what trains have run."""
        return self.what_trains_has_run and network in self.networks_run

    def _is_read_by_nothing(self, network: str) -> bool:
        """Whether nothing that trains was computed from the network."""
        return self.leaves_read.isdisjoint({*self.unjudged[network], _UNKNOWN})

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


def _leaves_behind(values: Iterable[object]) -> set[int]:
    """The ids of the parameters from which these values were computed, or which are among them."""
    tensors = list(filter(is_tensor, values))
    found = set(map(id, tensors))
    for node in nodes_behind(tensors):
        found.add(id(getattr(node, "variable", None)))
        if issubclass(getattr(type(node), NODE_FUNCTION, object), CHECKPOINT_FUNCTION):
            found.add(_UNKNOWN)
    return found
