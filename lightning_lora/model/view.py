"""A model's layers, adapters and base, by name, and which of them train."""

from copy import copy
from functools import cached_property

from torch import nn

from lightning_lora.base.states import USE
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.model.records import records_in
from lightning_lora.model.start_call import record_of
from lightning_lora.model.views.tensors_view import TensorsView
from lightning_lora.networks.still_networks import NO_NETWORKS
from lightning_lora.tensors.dicts import only, prefixed, where, with_values, without
from lightning_lora.tensors.names import is_bias, names_not_in, names_outside, owner_of
from lightning_lora.tensors.shards import is_dtensor


class View(TensorsView):
    """The layers, adapters, parameters and buffers of a model, by name.

    A shared layer or tensor has several names. A call makes one view, and what the view
    has seen is cached. So after a change of classes, of parameters or of the networks
    in the record, the view is stale until ``look_again``. The functions of
    ``changes/attach.py`` that attach or detach adapters call it themselves, and whoever
    else changes these calls it. With ``config``, the view shows what a new
    configuration asks for, before the record has it.

    It is built in three steps, each a base class: layers (:class:`.LayersView`),
    tensors (:class:`.TensorsView`), and here, which of ``base_parameters`` train beside
    the adapters (``trainable_base``), and which do not (``frozen_base``).
    """

    def as_recorded(self) -> "View":
        """Return a view of the same modules that shows the record's configuration."""
        view = copy(self)
        view._config_asked_for = None
        view.look_again()
        return view

    @cached_property
    def trainable_base(self) -> dict[str, nn.Parameter]:
        """The base's parameters that train beside the adapters: of modules trained in full, and biases.

        None of them is in a network that stands still.
        """
        config = self.config
        if not config.modules_to_save and config.bias == "none":
            return {}
        selected = self._saved_parameters() | self._trained_biases()
        trained = with_values(self.base_parameters, selected)
        networks = self.adapter.networks if self.is_adapted else NO_NETWORKS
        stand_still = (*networks.copies, *networks.beside_training)
        return only(trained, set(names_outside(trained, stand_still)))

    def _saved_parameters(self) -> set[nn.Parameter]:
        """The parameters that ``modules_to_save`` selects: of modules, or named themselves."""
        saved = set[nn.Parameter]()
        for module in self.saved_modules:
            saved.update(module.parameters())
        for name, parameter in self.base_parameters.items():
            if self.config.is_saved(name):
                saved.add(parameter)
        return saved

    def _trained_biases(self) -> set[nn.Parameter]:
        """The biases that the argument ``bias`` selects.

        ``"lora_only"``: those of the modules that hold adapted weights, as an attention
        does.
        """
        modules_with_trained_biases = {
            "none": set[str](),
            "lora_only": {owner_of(weight) for weight in self.adapted_weights},
            "all": self.modules.keys(),
        }
        modules = modules_with_trained_biases[self.config.bias]
        return {
            parameter
            for name, parameter in self.base_parameters.items()
            if is_bias(name) and owner_of(name) in modules
        }

    @cached_property
    def frozen_base(self) -> dict[str, nn.Parameter]:
        """The base's other parameters, which do not train."""
        return without(self.base_parameters, self.trainable_base)

    @cached_property
    def frozen_by_user(self) -> set[str]:
        """The names of the parameters that the user froze.

        If all are frozen, that says nothing about a single one: then the set is empty.
        """
        user_trains = self._user_trains()
        can_train = where(self.base_parameters, _is_plain_float)
        frozen = set[str]()
        for name in can_train:
            # a parameter that no record knows yet says it itself
            is_trainable = self.parameters[name].requires_grad
            if not user_trains.get(name, is_trainable):
                frozen.add(name)
        return frozen if frozen != can_train.keys() else set()

    def _user_trains(self) -> dict[str, bool]:
        """Whether the user wants parameters to train, as records say (``Base.user_trains``).

        Where the model's record and that of a module in it differ, the model's counts.
        """
        user_trains = dict[str, bool]()
        # the model's own record is the first one, so here it comes last, and wins
        for prefix, record in reversed(records_in(self.modules).items()):
            if not record.state.is_merged:
                user_trains.update(prefixed(prefix, record.base.user_trains))
        return user_trains


def _is_plain_float(parameter: nn.Parameter) -> bool:
    """Whether a parameter could train by itself: not one of integers, or of a quantised class."""
    is_plain = type(parameter) is nn.Parameter or is_dtensor(parameter)
    return is_plain and parameter.is_floating_point()


def view_of(model: nn.Module, call: str = USE) -> View:
    """Start a call on an adapted model, and return a :class:`View` of it.

    A model that has lost some of its adapters is refused too.
    """
    record_of(model, call)
    view = View(model)
    refuse_lost_adapters(view)
    return view


def refuse_lost_adapters(view: View) -> None:
    """Refuse a model in which layers have lost their adapters."""
    record = view.record
    adapted = {**view.layers_by_all_names, **record.merged_layer_adapters}
    lost = [
        name
        for name in names_not_in(record.adapter.layers, adapted)
        if name in view.modules
    ]
    if lost:
        raise AdapterStateError(
            f"{listed(lost)} of {view.title} no longer have their adapters: replaced, "
            "or merged by a call on a module that shares them. Call unmerge_adapters "
            "on that one, or inject_adapters for new adapters."
        )
