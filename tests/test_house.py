"""The house stays small enough to be read."""

import ast
import re
from pathlib import Path

import pytest

import lightning_lora

HOUSE = Path(lightning_lora.__file__).parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_package_has_at_most_16400_lines() -> None:
    assert sum(map(lines_of, HOUSE.rglob("*.py"))) <= 16_400


def test_the_tests_have_at_most_23800_lines() -> None:
    assert sum(map(lines_of, Path(__file__).parent.rglob("*.py"))) <= 23_800


def test_no_prefix_of_a_name_is_without_its_dot() -> None:  # the module "enc" is not around "encoder"
    texts = [path.read_text() for path in HOUSE.rglob("*.py")]
    assert not [text for text in texts if re.search(r'startswith\(f"[^"]*\}"\)', text)]


def test_each_file_has_a_name_of_its_own() -> None:
    commands = HOUSE / "cli"  # where a file has the name of a command
    names = [path.name for path in HOUSE.rglob("*.py") if path.name != "__init__.py" and path.parent != commands]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("floor", ["storage", "storage/formats", "storage/offline", "model", "training"])
def test_a_folder_has_at_most_twelve_rooms_and_each_is_one_story(floor: str) -> None:
    rooms = [path for path in (HOUSE / floor).glob("*.py") if path.name != "__init__.py"]
    assert 0 < len(rooms) <= (10 if floor == "model" else 12)
    assert [path.name for path in rooms if lines_of(path) >= 400] == []


def test_a_thousand_lines_have_fewer_than_fifty_comprehensions() -> None:
    number = lines = 0
    for path in HOUSE.rglob("*.py"):
        text = path.read_text()
        number += sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(ast.parse(text)))
        lines += len(text.splitlines())
    assert number < 50 * lines / 1000, f"{number} in {lines} lines"
