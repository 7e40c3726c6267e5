"""Fill the tables into the pages, as far as their jobs are finished."""

import re

from .jobs import Results
from .plan import PARTS, are_finished
from .tables import COMPARING, TABLES


def fill(page: str, results: Results) -> str:
    """Return a page with its tables made anew, as far as their jobs are finished.

    Each table stands between ``<!-- name -->`` and ``<!-- end -->``.
    """

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if not finished(name, results):
            return match[0]
        return f"<!-- {name} -->\n\n{TABLES[name](results)}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def finished(table: str, results: Results) -> bool:
    """Whether the files of a table are all there."""
    if table in NEEDS:
        return all(finished(each, results) for each in NEEDS[table])
    if table in results.found:
        return True
    part, _, _ = table.partition("-")
    return part in PARTS and are_finished(PARTS[part](results), results)


NEEDS: dict[str, tuple[str, ...]] = {
    "fresh": ("epochs",),
    "forgotten": ("table2", "definitions"),
    "gpt3": (),
    "overview": ("table2", "epochs", "costs-reviews"),
    "together": ("table2", "epochs"),
    "table3": ("references", "table3-rates"),
    "table7": ("subspaces",),
    "verdicts": COMPARING,
    "coverage": ("table2", "definitions", "few", "table3"),
}
"""Tables that need what their names do not say."""
