"""Read a folder of PEFT's for a model.

``read_peft.py`` sorts the tensors into adapters and the rest. ``updates_in_file.py``
makes an update of each adapter: there is a class for each way in which PEFT adapts a
module. ``completeness.py`` asks what is missing.
"""
