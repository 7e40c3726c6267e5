"""Frozen networks that may be backbones: does what trains read them? The first step tells. If not, adapters go off."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import StrategyError, listed
from lightning_lora.layers import LoRALayer
from lightning_lora.model.still.find_still import about_networks_left_out
from lightning_lora.model.still.settle import leave_alone
from lightning_lora.model.view import View, view_of
from lightning_lora.private import NODE_FUNCTION, tree_leaves
from lightning_lora.tensors.dicts import only, where, with_values, without
from lightning_lora.tensors.graphs import nodes_behind
from lightning_lora.tensors.names import names_inside, names_outside, owner_of
from lightning_lora.tensors.values import is_tensor
from lightning_lora.training.optimizers.edits import rewrite_groups
from lightning_lora.training.optimizers.groups import groups_of, held_by
from lightning_lora.training.optimizers.places import no_place_error
from lightning_lora.training.steps.reentrant import CHECKPOINT_FUNCTION

_WHAT_TRAINS = ""  # stands among the networks that have run for what trains
_UNKNOWN = 0  # stands for whatever a reentrant checkpoint has computed: its graph is made in the backward pass


class Feeding:
    """Notes which frozen networks feed what trains. The graphs behind the inputs of the layers that train say so.

    A backbone feeds its head. A network in the loss, and a teacher, feed nothing that trains.
    """

    def __init__(self, trainer: Trainer, view: View) -> None:
        self.trainer = trainer
        self.unjudged: dict[str, set[int]] = {}  # the networks, with the ids of their adapters' parameters
        self.found: set[int] = set()  # parameters from which inputs of what trains were computed
        self.have_run: set[str] = set()
        self.hooks: list[RemovableHandle] = []
        for network in view.adapter.networks.under_head:
            self.unjudged[network] = set()
            for name in names_inside(view.layers, [network]):
                self._watch_layer(network, view.layers[name])
        if self.unjudged:
            for module in _modules_that_train(view, self.unjudged) or _modules_without_adapters(view):
                self.hooks.append(module.register_forward_pre_hook(self._look_at_inputs, with_kwargs=True))

    def _watch_layer(self, network: str, layer: LoRALayer) -> None:
        """Note when a layer of a network runs."""
        self.unjudged[network].update(map(id, layer.lora_trainable()))
        self.hooks.append(layer.register_forward_pre_hook(partial(self._note_network, network)))

    def _note_network(self, network: str, *_: Any) -> None:
        if self.trainer.training:  # in a validation of the fit, all may run
            self.have_run.add(network)

    def _look_at_inputs(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.have_run.add(_WHAT_TRAINS)
        if not self.have_run.isdisjoint(self.unjudged):  # what feeds a layer has run before it
            self.found |= _leaves_behind(tree_leaves((args, kwargs)))

    def judge(self, networks: Iterable[str], is_agreed: Callable[[bool], bool]) -> tuple[list[str], list[str]]:
        """Judge these networks, once each. Return those that feed nothing, and those that feed what trains.

        A network waits for another step until it and what trains have run in all processes (``is_agreed``).
        """
        unfed = []
        fed = []
        for name in networks:
            if not is_agreed(self._have_both_run(name)):
                continue
            if is_agreed(self._feeds_nothing(name)):
                unfed.append(name)
            else:
                fed.append(name)
            del self.unjudged[name]
        return unfed, fed

    def _have_both_run(self, network: str) -> bool:
        """Whether a network and what trains have run."""
        return {_WHAT_TRAINS, network} <= self.have_run

    def _feeds_nothing(self, network: str) -> bool:
        """Whether nothing that trains was computed from the network."""
        return self.found.isdisjoint({*self.unjudged[network], _UNKNOWN})

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()


def _modules_that_train(view: View, networks: Collection[str]) -> set[nn.Module]:
    """What trains beside these networks: adapted layers, and modules in full."""
    beside = only(view.layers, names_outside(view.layers, networks))
    training: set[nn.Module] = set(where(beside, LoRALayer.lora_trainable).values())
    for module in view.saved:
        training.update(module.modules())
    return training


def _modules_without_adapters(view: View) -> set[nn.Module]:
    """The modules with weights that the user has not frozen, but without adapters."""
    owners = set(map(owner_of, without(view.base, view.frozen_by_user)))
    return set(only(view.modules, owners - view.layers.keys()).values())


def _leaves_behind(values: Iterable[object]) -> set[int]:
    """The ids of the parameters from which these were computed."""
    tensors = list(filter(is_tensor, values))
    found = set(map(id, tensors))
    for node in nodes_behind(tensors):
        found.add(id(getattr(node, "variable", None)))
        if issubclass(getattr(type(node), NODE_FUNCTION, object), CHECKPOINT_FUNCTION):
            found.add(_UNKNOWN)
    return found


# The judgement, before the first optimizer step


def remove_unfed(
    model: LightningModule, optimizer: Optimizer, strategy: Any, feeding: Feeding, *, copied: bool
) -> bool:
    """Remove the adapters of frozen networks that feed nothing that trains. No optimizer has changed them yet.

    All processes judge together. With ``copied``, the optimizer trains copies of the parameters. Return whether there
    were such networks. Refuse one that feeds what trains, if no optimizer has a place for its adapters.
    """
    to_judge = list(feeding.unjudged)
    if not copied:
        to_judge = _judged_with(optimizer, strategy.optimizers, feeding.unjudged)
    unfed, fed = feeding.judge(to_judge, strategy.reduce_boolean_decision)
    if fed:
        view = view_of(model)
        if not copied:
            _check_places(view, fed, strategy.optimizers)
        _tell_of_fed(view, fed, unfed)
    if not unfed:
        return False
    said = about_networks_left_out(unfed, view_of(model).title)
    if copied:
        raise StrategyError(
            f"{said} DeepSpeed cannot take parameters out of a fit that has begun. "
            f"Name it yourself: exclude_modules={unfed}."
        )
    leave_alone(view_of(model), unfed)
    rank_zero_info(said)
    _take_out_frozen(model, optimizer)
    return True


def _judged_with(optimizer: Optimizer, optimizers: Sequence[Optimizer], networks: Mapping[str, Set[int]]) -> list[str]:
    """The networks that an optimizer trains, or that none does."""
    held_here = set(map(id, held_by([optimizer])))
    held_anywhere = set(map(id, held_by(optimizers)))
    judged = []
    for name, parameters in networks.items():
        if not held_here.isdisjoint(parameters) or held_anywhere.isdisjoint(parameters):
            judged.append(name)
    return judged


def _check_places(view: View, fed: Sequence[str], optimizers: Sequence[Optimizer]) -> None:
    """Refuse networks that feed what trains, if no optimizer holds their adapters."""
    placed = with_values(view.adapter_parameters, held_by(optimizers))
    unplaced = names_inside(without(view.adapter_parameters, placed), fed)
    if unplaced:
        raise no_place_error(view.title, unplaced, len(list(groups_of(optimizers))))


def _tell_of_fed(view: View, fed: Sequence[str], unfed: Sequence[str]) -> None:
    """Say that adapters train in a frozen network too, if others train besides."""
    others = names_outside(view.layers, (*fed, *unfed))
    if others:
        rank_zero_info(
            f"Without LoRACallback, only a head of {view.title} would train. With it, adapters train in {listed(fed)} "
            f"too. To leave that as it is: exclude_modules={fed}."
        )


def _take_out_frozen(model: nn.Module, optimizer: Optimizer) -> None:
    """Take parameters that train no more out of the groups."""
    view = view_of(model)
    trained = set(model.parameters()) - set(view.frozen.values())
    groups = []
    for group in optimizer.param_groups:
        groups.append([parameter for parameter in group["params"] if parameter in trained])
    rewrite_groups(view, optimizer, groups)
