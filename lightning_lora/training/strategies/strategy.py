"""Our methods over those of a strategy: what they do where callbacks have no hook."""

from typing import ClassVar

from lightning_lora.training.steps.gradients import Gradients
from lightning_lora.training.steps.received import received_gradients
from lightning_lora.training.strategies.load_methods import LoadMethods
from lightning_lora.training.strategies.save_methods import SaveMethods
from lightning_lora.training.strategies.step_methods import StepMethods


class StrategyMethods(LoadMethods, SaveMethods, StepMethods):
    """Our methods for one strategy. They stay after a stage: files are written then too.

    A file for each part of a run has the methods: the set-up, loading, saving, and the steps. Lightning has no public
    hook at these moments, or none that keeps what each method promises:

    - ``setup``: after ``configure_model``, before the module is converted. A ``configure_model`` set on the module
      would be in its copies and pickles, and EMA would call it. ``on_fit_start`` comes after the tuners' trials.
    - ``setup_optimizers``: the same, with ``configure_optimizers``, which may return six forms.
    - ``load_checkpoint``: a ``checkpoint_io`` is not asked by all strategies, and is by launchers.
    - ``load_model_state_dict``: ``load_state_dict`` writes what fits before it says what does not.
    - ``load_optimizer_state_dict``: all states are loaded, or none.
    - ``lightning_module_state_dict``: hooks that save see what the file will hold, and the base is not copied.
    - ``save_checkpoint``: only the first process asks a ``checkpoint_io``, but each refuses what cannot be saved.
    - ``process_dataloader``: after the user's code has made the loader, before its workers draw.
    - ``training_step``, ``backward``: something around each call, which also ends after an error. An optimizer may run
      several of them in a batch.
    """

    overlaid: ClassVar[tuple[str, ...]] = (
        "setup",
        "setup_optimizers",
        "load_checkpoint",
        "load_model_state_dict",
        "load_optimizer_state_dict",
        "lightning_module_state_dict",
        "save_checkpoint",
        "process_dataloader",
        "training_step",
        "backward",
    )

    def gradients(self, *, is_new_fit: bool) -> Gradients:
        """Return what watches the gradients of a fit."""
        received = received_gradients(self.module, self.strategy.model, self.awaited_by_ddp)
        return Gradients(self.module, received, is_new_fit=is_new_fit)
