"""Adapter files and checkpoints.

This may change a model through ``lightning_lora.model``, and imports no Lightning. All
files are about ``stored.py``: adapters outside of a model. Their values are those that
training changed, which ``state.py`` finds. Files also describe the layers
(``stored_layers.py``), the modules (``stored_modules.py``) and the base
(``same_base/``), and tell damage by ``checksum.py``.

``formats/`` reads and writes this, and ``on_disk/`` knows files themselves. ``load/``
puts it on a model, which may have other names (``renaming.py``, ``whole_names.py``).

In names, "here" is the model at hand, and "there" is the file, or the model that it was
saved from. Files hold no values of the base. But some tensors belong "to no base",
because each run has its own values of them: frozen weights that look untrained, as
those of a new head, and buffers that hooks filled. Files hold these too. A "note" of
torch stands beside the values of a state dict (``_metadata``), and a "hint" is an entry
of the state itself, for readers without this package.

Ten words are the names of what ``View`` (``model/view.py``), ``AdapterState`` and
``Base`` (``lightning_lora/base/``) know of a model:

- ``base_parameters``: all parameters that are no adapter's.
- ``trainable_base``: those of them that train in full, beside the adapters.
- ``frozen_base``: the rest of them, which do not train. Adapted weights belong here.
- ``originals``: the base's values of all that may change beside the adapters.
- ``changes``: the frozen tensors that other code than an optimizer has changed.
- ``filled``: the buffers that the module's own hooks have filled.
- ``of_no_base``: the frozen weights that look untrained. Of adapters from a file, it
  names the filled buffers of that run too.
- ``fingerprints``: the base as a Trainer has read it, in each form that it had.
- ``may_have_learned``: whether training has begun, or a file was loaded.
- ``layers``: the layers of an adapter. A new one is "without layers" at first.

All this is called without a Trainer (``files.py``, ``several.py``), by a Trainer
(``checkpoint.py`` and ``beside_adapters.py``), and by the console command
(``offline/``). Merged models in files are computed by ``merged_state.py``, for
``merged_model.py`` and ``own_save_pretrained.py``.
"""
