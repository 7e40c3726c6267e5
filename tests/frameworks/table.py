"""The table of docs/frameworks.md, made from the files alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "frameworks.md"
OWN = ("own, default", 'own, save="model"')
COLUMNS = (*OWN, "resume", "load", "moves", "file")
WORKS = ("yes", "to rounding")

Facts = dict[str, Any]  # what is measured of one model
Results = dict[str, dict[str, Any]]  # what the file of each framework holds


def fill(page: str) -> str:
    """Return the page with what is between ``<!-- name -->`` and ``<!-- end -->`` made anew, and with the versions."""
    results = results_by_framework()
    sections = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    page = replace_part(page, "table", table(results, sections))
    page = replace_part(page, "not as expected", "\n".join(unexpected(results)))
    for name, result in results.items():
        if "versions" in result:
            page = replace_version(page, name, result["versions"][name])
    return page


def results_by_framework() -> Results:
    """What each file holds, by the framework's name."""
    results = {}
    for path in sorted(RESULTS.glob("*.json")):
        results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return results


def replace_part(page: str, name: str, text: str) -> str:
    """Return the page with another text after ``<!-- name -->``."""
    before, begin, rest = page.partition(f"<!-- {name} -->")
    _, end, after = rest.partition("<!-- end -->")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def replace_version(page: str, name: str, version: str) -> str:
    """Return the page with another version in the section of a framework."""
    begin = f"## {name}\n\nRun with {name}"
    return re.sub(rf"^{begin} \S+", f"{begin} {version}.", page, flags=re.MULTILINE)


def table(results: Results, sections: list[str]) -> str:
    """Return a row for each model.

    A framework that was not installed has one, with its error.
    """
    lines = [line_of("", *COLUMNS), line_of("---", *["---"] * len(COLUMNS))]
    for name, result in results.items():
        title = f"[{name}](#{name})" if name in sections else name
        if "failed" in result:
            empty = [""] * (len(COLUMNS) - 1)
            lines.append(line_of(title, result["failed"], *empty))
        for model, facts in result.get("models", {}).items():
            lines.append(line_of(f"{title}: {model}", *cells(facts)))
    return "\n".join(lines)


def line_of(*cells_of_row: str) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells_of_row)} |"


def cells(facts: Facts) -> list[str]:
    """What a model's row shows in each of the ``COLUMNS``."""
    own_ways = list(facts["own"].values())
    plain = count_working(own_ways, "plain")
    return [
        f"{count_working(own_ways, 'adapters')} of {plain}",
        f"{count_working(own_ways, 'model')} of {plain}",
        short(resuming(facts)),
        short(facts.get("load_adapter")),
        short(moving(facts)),
        short(holding(facts)),
    ]


def count_working(ways: list[dict[str, str]], kind: str) -> int:
    """Count the ways that work without LoRA, and with this kind of file."""
    working = [way for way in ways if way.get(kind) == way["plain"] == "yes"]
    return len(working)


def short(fact: str | None) -> str:
    """Return a fact without its details, which the list has."""
    if fact is None:
        return "–"
    if fact.startswith("no:"):
        return "**no**"
    if "Error:" in fact:
        return "error"
    return fact


def resuming(facts: Facts) -> str | None:
    """Say whether a run can go on from a file, and from which kind."""
    default = facts.get("resume, adapters")
    whole = facts.get("resume, model")
    if default not in WORKS and whole in WORKS:
        return f'{whole}, with `save="model"`'
    return default


def moving(facts: Facts) -> str | None:
    """Count the matrices that move only with LoRA, or only without it."""
    if "moves" not in facts:
        return None
    more = facts["moves"]["only with"]
    fewer = facts["moves"]["only without"]
    differences = []
    if more:
        differences.append(f"**{len(more)} more**")
    if fewer:
        differences.append(f"{len(fewer)} fewer")
    return ", ".join(differences) or "the same"


def holding(facts: Facts) -> str | None:
    """Say whether the file has matrices of the base beside the adapters."""
    if "base in the file" not in facts:
        return None
    count = len(facts["base in the file"])
    return f"{count} more" if count else "adapters"


def unexpected(results: Results) -> Iterator[str]:
    """Yield a line for each fact that is not right, but for the errors that ``save="model"`` is for."""
    for name, result in results.items():
        for model, facts in result.get("models", {}).items():
            for what, fact in in_words(facts).items():
                if fact not in WORKS:
                    yield f"- {name}: {model}, {what}: {fact.removeprefix('no: ')}"


def in_words(facts: Facts) -> dict[str, str]:
    """The facts that should be "yes"."""
    words = {}
    for what, fact in facts.items():
        if isinstance(fact, str):
            words[what] = fact
        elif what == "moves" and fact["only with"]:
            some = ", ".join(fact["only with"][:3])
            words[what] = f"no: only with LoRA: {some}"
    return words | own_ways_in_words(facts["own"])


def own_ways_in_words(own: dict[str, dict[str, str]]) -> dict[str, str]:
    """What a framework's ways give, if they work without LoRA, but for an error with the default kind of file."""
    words = {}
    for way, facts in own.items():
        if facts["plain"] != "yes":
            continue
        for kind, fact in facts.items():
            if kind != "adapters" or fact.startswith("no:"):
                words[f"{way}, {kind}"] = fact
    return words
