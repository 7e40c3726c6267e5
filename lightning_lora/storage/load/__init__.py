"""The one way in, ``put.py``: adapters are read, all of them are checked, and then they are written, or nothing is.

Words such as ``originals`` and ``filled`` are explained in ``storage/__init__.py``.

Before, names become the model's (``other_names.py``), and modules are built that a file
needs (``built_modules.py``, ``rebuilding.py``). ``fits.py`` checks. State dicts come by
``from_state_dicts.py``, those that torch loads too. Two kinds of checkpoints are about
the base: those without adapters (``full_states.py``), and those whose merged weights
other code has loaded (``base_of_merged.py``).
"""
