"""Write a folder for PEFT.

``fitted.py`` leaves out or refuses what PEFT cannot hold. ``write_peft.py`` makes the tensors and the configuration:
files of diffusers and kohya are made of these too. ``model_card.py`` writes the README.md beside them.
"""
