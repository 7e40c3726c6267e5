"""What the search of the site shows first, and what it leaves out: mkdocs calls the function for each page."""

from typing import Any

# with them, numbers and words of the study stood above all answers
LEFT_OUT = ("paper-tables.md", "contributing.md")
FIRST = (
    "choosing.md",
    "hugging-face.md",
    "merging.md",
    "mistakes.md",
    "rates.md",
    "resuming.md",
    "targets.md",
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Set what the search's plugin reads: the page itself stays as it is."""
    if page.file.src_uri in LEFT_OUT:
        page.meta["search"] = {"exclude": True}
    elif page.file.src_uri in FIRST:
        page.meta["search"] = {"boost": 2}
    return markdown
