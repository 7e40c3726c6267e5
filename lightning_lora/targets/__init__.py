"""Select the layers of a model to adapt.

A name that matches nothing is an error that shows similar names. Nothing here changes a model.
"""
