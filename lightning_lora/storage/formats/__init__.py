"""The formats of files: each is read into ``StoredAdapters``, and most are written from it.

Recognise: ``format.py`` says what a format is, ``registry.py`` has the list of all, and
``peft_or_diffusers.py`` tells two that have the same names. ``unread.py`` has tools whose
files are only called by name. ``contents.py`` opens any file.

Read: a format turns its tensors into updates of layers (``layer_updates.py``), and
``from_updates.py`` makes stored adapters of these. ``trained_in_full.py`` finds what else
trained.

Write: an ``Export`` (``export.py``) has the adapters for another program, with its names.
``weight_updates.py`` has the update of each weight, and ``written_files.py`` writes a
folder, all of it or nothing.

The formats of other libraries: ``peft/`` with ``peft_names.py``, ``pipelines/`` (diffusers
and kohya), and ``loralib.py``, which is only read. Our own: ``own.py`` has the files of
this package, and ``lightning.py`` what is in a checkpoint of Lightning.
"""
