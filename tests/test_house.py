"""The house stays easy to read."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora.printing import as_writable
from tests.support.density import density_of

HOUSE = Path(lightning_lora.__file__).parent
TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


# the module "enc" is not around "encoder"
def test_no_prefix_of_a_name_is_without_its_dot() -> None:
    texts = [path.read_text() for path in HOUSE.rglob("*.py")]
    assert not [text for text in texts if re.search(r'startswith\(f"[^"]*\}"\)', text)]


# a log may hold nothing else
def test_messages_are_ascii_and_other_signs_are_printed_as_such() -> None:
    for path in HOUSE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        docs = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
        for node in strings:
            assert node in docs or as_writable(node.value, "ascii").count(
                "\\"
            ) == node.value.count("\\"), node.value


def test_each_file_has_a_name_of_its_own() -> None:
    commands = HOUSE / "cli"  # where a file has the name of a command
    names = [
        path.name
        for path in HOUSE.rglob("*.py")
        if path.name != "__init__.py" and path.parent != commands
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "floor",
    [
        "storage",
        "storage/formats",
        "storage/offline",
        "model",
        "targets",
        "layers",
        "layers/each_kind",
        "training",
    ],
)
def test_a_folder_has_at_most_sixteen_rooms(floor: str) -> None:
    rooms = [
        path for path in (HOUSE / floor).glob("*.py") if path.name != "__init__.py"
    ]
    assert 0 < len(rooms) <= 16


@dataclass(frozen=True)
class Limits:
    """How densely code may be written.

    A change may lower these numbers, and does not raise them.
    """

    branches_in_100_lines: float
    comprehensions_in_1000_lines: float
    share_of_dense_lines: float
    names_a_line: float
    long_functions: int


LIMITS = {
    HOUSE: Limits(18, 22.3, 0.0099, 2.14, 0),
    TESTS: Limits(7.8, 15.3, 0.025, 1.94, 0),
    EXAMPLES: Limits(14.6, 26, 0.026, 2.26, 0),
}


@pytest.mark.parametrize("root", LIMITS, ids=lambda root: root.name)
def test_code_asks_no_more_of_its_reader(root: Path) -> None:
    density = density_of(root.rglob("*.py"))
    limits = LIMITS[root]
    assert density.branches_in_100_lines <= limits.branches_in_100_lines
    assert density.comprehensions_in_1000_lines <= limits.comprehensions_in_1000_lines
    assert density.share_of_dense_lines <= limits.share_of_dense_lines
    assert density.names_a_line <= limits.names_a_line
    assert len(density.long_functions) <= limits.long_functions, density.long_functions


def test_each_file_of_the_package_tells_one_story_in_at_most_400_lines() -> None:
    assert [path.name for path in HOUSE.rglob("*.py") if lines_of(path) > 400] == []
