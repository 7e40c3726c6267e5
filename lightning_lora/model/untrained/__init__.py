"""Layers that look untrained, as a new head: what they hold is not pretrained, and files must hold it too.

- untrained: all its values look drawn from one uniform or normal distribution, as torch
  and others initialise layers.
- small: a weight has too few values to be judged.
- unsure: a layer looks untrained, and has a small weight.
- blank: all values of a norm are one or zero, which says nothing.
- random weights: frozen ones that may be untrained. Files hold them, because another
  process draws others.
- of no base: random weights, and buffers that the module's hooks filled.

Not every initialisation is known: a layer counts as untrained only if that is clear.
"""
