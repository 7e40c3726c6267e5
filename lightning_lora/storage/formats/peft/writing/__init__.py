"""Write a folder for PEFT.

``what_fits.py`` leaves out or refuses what PEFT cannot hold. ``peft_form.py`` makes the
tensors and the configuration: files of diffusers and kohya are made of these too.
``write_peft.py`` writes the folder, with the README.md that ``model_card.py`` makes.
"""
