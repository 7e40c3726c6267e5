"""The parts of a view: a model's layers, and its tensors."""
