"""The mathematics of LoRA, as functions of tensors.

It knows no layers and no models.
"""
