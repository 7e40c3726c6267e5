"""The page on stability lists the public names as they are."""

import inspect
import re
import textwrap
from pathlib import Path

import lightning_lora
from lightning_lora import metrics, plots

PAGE = Path(__file__).parent.parent / "docs" / "stability.md"
METRICS = ("UpdateNorm", "EffectiveRank", "Amplification", "SubspaceSimilarity")
PLOTS = ("plot_layers", "plot_losses")


def signature(name: str, value: object) -> str:
    """A name with its arguments and defaults, in lines of the page."""
    assert callable(value)
    found = inspect.signature(value)
    parameters = [
        each.replace(annotation=each.empty) for each in found.parameters.values()
    ]
    text = (
        f"{name}{found.replace(parameters=parameters, return_annotation=found.empty)}"
    )
    return textwrap.fill(
        text,
        80,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def listed() -> list[str]:
    """What the page should say: the names that are called, and the errors and warnings."""
    calls = []
    raised = []
    for name in lightning_lora.__all__:
        value = getattr(lightning_lora, name)
        if isinstance(value, type) and issubclass(value, Exception):
            raised.append(
                f"{name}({', '.join(base.__name__ for base in value.__bases__)})"
            )
        else:
            calls.append(signature(name, value))
    calls += [signature(f"metrics.{name}", getattr(metrics, name)) for name in METRICS]
    calls += [signature(f"plots.{name}", getattr(plots, name)) for name in PLOTS]
    return ["\n".join(calls) + "\n", "\n".join(raised) + "\n"]


def test_the_page_lists_the_public_names_with_their_arguments() -> None:
    said = re.findall(
        r"^```text\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    expected = listed()
    assert said == expected, "Write into docs/stability.md:\n\n" + "\n\n".join(expected)


def test_the_lowest_versions_on_the_page_are_those_of_the_package() -> None:
    page = PAGE.read_text()
    project = (PAGE.parent.parent / "pyproject.toml").read_text()
    for name, row in (("torch", "torch"), ("lightning", "Lightning")):
        (lowest,) = re.findall(rf'^    "{name}>=([\d.]+)",$', project, re.MULTILINE)
        assert re.search(
            rf"^\| {row}\b[^|]*\| {re.escape(lowest)}\b", page, re.MULTILINE
        )
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"$', project, re.MULTILINE)
    assert f"| Python | {python} |" in page
