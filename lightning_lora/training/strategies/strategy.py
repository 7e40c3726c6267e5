"""Which methods of a strategy we patch: they act where callbacks have no hook."""

from lightning_lora.training.strategies.load_methods import LoadMethods
from lightning_lora.training.strategies.save_methods import SaveMethods
from lightning_lora.training.strategies.step_methods import StepMethods


class StrategyMethods(LoadMethods, SaveMethods, StepMethods):
    """Our methods for one strategy.

    They stay after a stage: files are written then too. Each part of a run has a file:
    the set-up, loading, saving, and the steps. A method that is marked
    ``@patches_strategy`` is called by Lightning in place of the strategy's own, which
    it calls in turn. The reason for each: Lightning has no public hook at that moment,
    or none that keeps what the method promises.

    - ``setup``: it comes after ``configure_model``, and before the module is converted.
      A ``configure_model`` of ours, set on the module, would be in its copies and
      pickles, and EMA would call it. ``on_fit_start`` comes after the tuners' trials.
    - ``setup_optimizers``: a ``configure_optimizers`` of ours would be in copies and
      pickles too, and may return six forms.
    - ``load_checkpoint``: a ``checkpoint_io`` in place of it would be asked for other
      files too, those of launchers, and some strategies ask none.
    - ``load_model_state_dict``: torch's ``load_state_dict`` writes what fits before it
      says what does not.
    - ``load_optimizer_state_dict``: all states are loaded, or none.
    - ``lightning_module_state_dict``: hooks that save see what the file will hold, and
      the base is not copied.
    - ``save_checkpoint``: each process refuses what cannot be saved, but only the first
      one asks a ``checkpoint_io``.
    - ``process_dataloader``: it comes after the user's code has made the loader, and
      before the loader's workers draw.
    - ``training_step``, ``backward``: what acts during each call must also end after an
      error. An optimizer may run several of them in a batch.
    - ``validation_step``, ``test_step``, ``predict_step``: the same, around the first.

    What a kind of strategy may override, beside these:

    - ``check``: which strategies are accepted. ``shards_before_adapters``: whether
      ``configure_model`` shards.
    - ``setup_in_stage``, ``adapt``, ``note_base``: the parts of the set-up.
    - ``rebuild_optimizers``, ``load_plain``, ``adapt_replaced_layers``,
      ``load_states``: the parts of loading.
    - ``look_at_first_steps``, ``watching``, ``watching_evaluation``: what looks at the
      first steps.
    - ``gradients``, ``float32_steps``, ``strip_non_backbones``: what a training watch
      asks for.
    """
