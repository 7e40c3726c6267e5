"""The optimizers of a fit: they train the adapters in place of the base's weights."""
