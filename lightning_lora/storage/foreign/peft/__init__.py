"""PEFT's files, to read and to write.

Nothing here imports ``peft``.
"""
