"""Lets mkdocstrings read the docstrings as they are written here."""

from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Takes ``Example:`` for the section that griffe calls ``Examples:``."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section of one object."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
