"""Files of a pipeline of diffusers: one file has the adapters of several models, which are its members.

``members.py`` finds the members in a model. ``read_members.py`` hands what a file has for
each one to PEFT's code, and ``exported_members.py`` divides what is written among them.
``diffusers.py`` and ``kohya.py`` are the two formats.
"""
