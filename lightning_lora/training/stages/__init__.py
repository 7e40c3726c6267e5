"""One stage of a Trainer: fit, validate, test or predict.

How the module came to it, and how it is given back.
"""
