"""PEFT's files: their keys, their configuration, and what becomes of them.

Nothing here imports ``peft``.
"""
