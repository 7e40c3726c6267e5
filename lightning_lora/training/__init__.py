"""The Trainer's side: what happens in a run, from its set-up to its end.

Below this room, nothing knows Lightning. In the order in which a fit comes to them:

- ``stages/``: one stage of a Trainer. How the module came, how far the stage is, and
  what its end does to the module.
- ``strategies/``: methods of the Trainer's strategy that we patch, because no hook is
  called at their moments. They adapt the module, build optimizers, and load and save
  checkpoints.
- ``optimizers/``: they train the adapters in place of the base's weights.
- ``untrained_at_start.py``: which weights look untrained when the training begins.
- ``data_init/``: adapters that start from some batches of the training data.
- ``running.py``: what watches the training while it runs. ``steps/``: what it looks at
  in each step.
- ``merging.py``: the merge at the end of a fit.

Beside these:

- ``random_numbers/``: those of new adapters, and those with which a resumed run goes
  on.
- ``reports.py``: what is shown and logged.
- ``returned_records.py``: what a merged module gets back from the processes of a fit.
- ``compatibility/``: the other callbacks and plugins of a Trainer.
"""
