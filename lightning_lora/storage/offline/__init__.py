"""Work on files without the model's code: for the console command, and for sums of a model's own adapters.

A merge, ``merge_files.py``, begins with ``merge_plan.py``: which tensors of the base
change. Then ``merge_checks.py`` refuses what does not fit, and ``merged_tensors.py``
computes each tensor. The tensors are read by ``tensor_files.py`` and written by
``tensors_on_disk.py``, one by one. ``combine_files.py`` writes a sum, which ``sums.py``
computes. Adapters are read and computed with by ``without_model.py``.
"""
