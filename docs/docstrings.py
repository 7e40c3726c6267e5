"""Lets mkdocstrings read the docstrings as they are written here."""

import inspect
from typing import Any

from griffe import Extension, Object

from lightning_lora import LoRACallback


class ExampleSections(Extension):
    """Takes ``Example:`` for the section that griffe calls ``Examples:``."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section of one object.

        LoRACallback has the arguments of LoRAConfig only once it is imported.
        """
        if obj.docstring is not None:
            text = inspect.getdoc(LoRACallback) if obj.name == "LoRACallback" else None
            obj.docstring.value = (text or obj.docstring.value).replace(
                "\nExample:\n", "\nExamples:\n"
            )
