"""Adapter files of other libraries: PEFT's and loralib's.

Nothing here imports those libraries.
"""
