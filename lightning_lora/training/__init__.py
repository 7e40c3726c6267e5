"""Steps of a Trainer's run: optimizers, gradients, averages, checkpoints.

Apart from the callback, only this package imports Lightning. It may import every other subpackage.
"""
