"""The console command ``lightning-lora``.

Each command has its own file. None needs the model's code.
"""
