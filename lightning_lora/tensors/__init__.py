"""Tools for torch parameters and modules: names, classes, values.

Nothing here depends on LoRA.
"""
