"""The page of messages quotes those that the code has."""

import ast
import re
from pathlib import Path

import pytest

import lightning_lora

ROOT = Path(__file__).parent.parent
HEADINGS = re.findall(r"^### (.*)$", (ROOT / "docs" / "messages.md").read_text(), re.MULTILINE)
OTHERS = ("Option ", "RuntimeError: ")
"""How the messages of other packages begin."""


def texts() -> list[str]:
    """The texts in the code, with … for what is filled in. Docstrings are left out."""
    found = []
    for path in (ROOT / "lightning_lora").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        alone = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone:
                found.append(node.value)
    return found


TEXTS = texts()


@pytest.mark.parametrize("heading", [heading for heading in HEADINGS if not heading.startswith(OTHERS)])
def test_a_message_on_the_page_is_one_of_the_code(heading: str) -> None:
    kind, _, text = heading.partition(": ")
    text = text if kind in lightning_lora.__all__ else heading
    quoted = ".*".join(re.escape(part) for part in text.split("…"))
    assert [found for found in TEXTS if re.search(quoted, found, re.DOTALL)], text


def test_every_error_and_warning_is_on_the_page() -> None:
    kinds = {name for name in lightning_lora.__all__ if name.endswith(("Error", "Warning"))}
    assert kinds - {"LoRAError"} == {heading.partition(": ")[0] for heading in HEADINGS} & kinds
