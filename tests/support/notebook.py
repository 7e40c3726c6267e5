"""The notebook of the examples, and what it shows.

``python -m tests.support.notebook`` runs it, keeps its outputs, and writes the pictures
that the pages have from it. It needs the extras ``examples`` and ``notebook``.
"""

import base64
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
PICTURES = {"plot-losses": "losses.png", "plot-layers": "layers.png"}
"""The cells whose pictures are on pages, and their files in docs/pictures."""


def cells(kind: str) -> list[dict[str, Any]]:
    """Its cells of "code" or "markdown", each with its lines as one text."""
    found = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == kind:
            cell["source"] = "".join(cell["source"])
            found.append(cell)
    return found


def pictures_of(cell: dict[str, Any]) -> list[bytes]:
    """The pictures below a cell, as PNG."""
    found = []
    for output in cell.get("outputs", []):
        encoded = output.get("data", {}).get("image/png")
        if encoded:
            found.append(base64.b64decode("".join(encoded)))
    return found


def run() -> None:
    """Run all cells in their order, and keep the outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(
        notebook,
        record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)


def write_pictures() -> None:
    """Write the pictures that pages have."""
    for cell in cells("code"):
        if cell["id"] in PICTURES:
            (picture,) = pictures_of(cell)
            (ROOT / "docs" / "pictures" / PICTURES[cell["id"]]).write_bytes(picture)


if __name__ == "__main__":
    run()
    write_pictures()
