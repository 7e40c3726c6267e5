"""Files of other libraries: PEFT and loralib.

Nothing here imports those libraries.
"""
