"""Parameters and modules as torch has them: their names, their classes, their values.

It knows nothing of LoRA.
"""
