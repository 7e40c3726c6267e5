"""Adapter files and checkpoints. This may change a model through ``lightning_lora.model``, and imports no Lightning."""
