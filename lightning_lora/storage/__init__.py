"""Adapter files and checkpoints: contents, writing, and checks.

This package may change a model through ``lightning_lora.model``. It does not import Lightning.
"""
