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

All this is called without a Trainer (``files.py``, ``several.py``), by a Trainer
(``checkpoint.py`` and ``beside_adapters.py``), and by the console command
(``offline/``). Merged models in files are computed by ``merged_state.py``, for
``merged_model.py`` and ``own_save_pretrained.py``.
"""
