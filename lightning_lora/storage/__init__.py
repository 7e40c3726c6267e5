"""Files: what they hold, how they are written, and what is checked before they are used.

It may change a model through `model`, and knows nothing of a Trainer.
"""
