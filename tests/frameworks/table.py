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


def fill(page: str) -> str:
    """Return the page with what is between ``<!-- name -->`` and ``<!-- end -->`` made anew, and with the versions."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    sections = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    made = {"table": table(found, sections), "not as expected": "\n".join(unexpected(found))}
    for name, text in made.items():
        before, _, after = page.partition(f"<!-- {name} -->")
        page = f"{before}<!-- {name} -->\n\n{text}\n\n<!-- end -->{after.partition('<!-- end -->')[2]}"
    for name, result in found.items():
        if "versions" in result:
            begin = f"## {name}\n\nRun with {name}"
            page = re.sub(rf"^{begin} \S+", f"{begin} {result['versions'][name]}.", page, flags=re.MULTILINE)
    return page


def table(found: dict[str, Any], sections: list[str]) -> str:
    """Return a row for each model. A framework that was not installed has one, with its error."""
    rows = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for name, result in found.items():
        title = f"[{name}](#{name})" if name in sections else name
        if "failed" in result:
            rows.append([title, result["failed"], *[""] * (len(COLUMNS) - 1)])
        for model, facts in result.get("models", {}).items():
            rows.append([f"{title}: {model}", *cells(facts)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(facts: dict[str, Any]) -> list[str]:
    shown = [resuming(facts), facts.get("load_adapter"), moving(facts), holding(facts)]
    own = facts["own"].values()
    works = [[way.get(kind) == way["plain"] == "yes" for way in own] for kind in ("adapters", "model", "plain")]
    default, whole, plain = map(sum, works)
    return [f"{default} of {plain}", f"{whole} of {plain}", *map(short, shown)]


def short(fact: str | None) -> str:
    """Return a fact without its details, which the list has."""
    if fact is None:
        return "–"
    return "**no**" if fact.startswith("no:") else "error" if "Error:" in fact else fact


def resuming(facts: dict[str, Any]) -> str | None:
    default, whole = (facts.get(f"resume, {save}") for save in ("adapters", "model"))
    if default not in WORKS and whole in WORKS:
        return f'{whole}, with `save="model"`'
    return default


def moving(facts: dict[str, Any]) -> str | None:
    """Count the matrices that move only with LoRA, or only without it."""
    if "moves" not in facts:
        return None
    more, fewer = (len(facts["moves"][f"only {kind}"]) for kind in ("with", "without"))
    return ", ".join([f"**{more} more**"] * bool(more) + [f"{fewer} fewer"] * bool(fewer)) or "the same"


def holding(facts: dict[str, Any]) -> str | None:
    """Say whether the file has matrices of the base beside the adapters."""
    if "base in the file" not in facts:
        return None
    return f"{len(held)} more" if (held := facts["base in the file"]) else "adapters"


def unexpected(found: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each fact that is not right, but for the errors that ``save="model"`` is for."""
    for name, result in found.items():
        for model, facts in result.get("models", {}).items():
            works = {way: kinds for way, kinds in facts["own"].items() if kinds["plain"] == "yes"}
            ways = {f"{way}, {kind}": fact for way, kinds in works.items() for kind, fact in kinds.items()}
            own = {way: fact for way, fact in ways.items() if fact.startswith("no:") or not way.endswith("adapters")}
            more = facts.get("moves", {}).get("only with", [])
            others = {"moves": f"no: only with LoRA: {', '.join(more[:3])}"} if more else {}
            for what, fact in {**facts, **others, **own}.items():
                if isinstance(fact, str) and fact not in WORKS:
                    yield f"- {name}: {model}, {what}: {fact.removeprefix('no: ')}"
