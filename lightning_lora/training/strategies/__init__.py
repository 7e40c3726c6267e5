"""Methods of the Trainer's strategy that we patch.

Each kind of strategy has a file, and a line in ``for_strategy``.
"""
