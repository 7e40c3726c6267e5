"""How adapters start.

Each file registers its ways in one table: a new one is a file, and a word in the line
below.
"""

from lightning_lora.layers.inits import data, principal
from lightning_lora.layers.inits.table import INITIALISATIONS, Initialisation
