"""Weights that the user froze inside of ``modules_to_save``, which trains them all the same."""

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.guards.wording import warn_in_each_fit
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import names_joined, parameters_by_name


class FrozenInModulesToSave(Guard):
    """Names frozen weights that ``modules_to_save`` trains."""

    def training_begins(self, view: View) -> None:
        """Name them where others of the same module were not frozen: a module that was frozen whole is meant so."""
        config = view.config
        for name, module in view.modules.items():
            if config.is_saved(name):
                _warn_if_partly_frozen(view, name, module)


def _warn_if_partly_frozen(view: View, name: str, module: nn.Module) -> None:
    """Name the frozen weights of a module that trains in full, if they are some of it and not all."""
    trained = names_joined(name, where(parameters_by_name(module), _trains))
    flags_of_user = view.record.base.user_trains
    frozen_by_user = [each for each in trained if flags_of_user.get(each) is False]
    if 0 < len(frozen_by_user) < len(trained):
        warn_in_each_fit(
            f"modules_to_save trains all of {name!r}, also {listed(frozen_by_user)}, "
            f"which {view.title} has frozen (requires_grad). To keep these frozen, "
            "name the modules beside them in place of it."
        )


def _trains(p: nn.Parameter) -> bool:
    """Whether a parameter trains: not one of integers."""
    return p.requires_grad
