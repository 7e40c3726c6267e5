"""Files of a pipeline of diffusers: one file has the adapters of several models, which are its members.

``pipeline.py`` finds the members in a model, and hands each one's adapters to PEFT's
code. ``diffusers.py`` and ``kohya.py`` are the two formats.
"""
