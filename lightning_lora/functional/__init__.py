"""The mathematics of LoRA, as functions of tensors.

Nothing here depends on layers or models.
"""
