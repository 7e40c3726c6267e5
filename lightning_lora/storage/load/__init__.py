"""The one way in.

Whatever is loaded by whoever: it is read, all of it is checked, and then it is written
or undone. That is ``put.py``. Before, names become the model's (``other_names.py``),
and modules are built that a file needs (``built_modules.py``, ``rebuilding.py``).
``fits.py`` checks. ``from_state_dicts.py`` is for state dicts, also those that torch
loads. ``full_states.py`` is for checkpoints without adapters, and ``base_of_merged.py``
for those whose merged weights other code has loaded.
"""
