"""How densely code is written: what a reader must hold in mind for one line, and for one function."""

import ast
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.IfExp,
    ast.BoolOp,
    ast.comprehension,
    ast.Try,
    ast.With,
    ast.AsyncWith,
    ast.ExceptHandler,
    ast.match_case,
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*FUNCTIONS, ast.ClassDef, ast.Module)
CONTEXTS = (ast.Load, ast.Store, ast.Del)  # syntax nodes that nobody writes

NODES_OF_A_DENSE_LINE = 14
BRANCHES_OF_A_LONG_FUNCTION = 10


@dataclass
class Density:
    """What was counted in some files."""

    code_lines: int = 0  # no blanks, comments, docstrings or imports
    lines_with_nodes: int = 0
    dense_lines: int = 0
    branches: int = 0
    comprehensions: int = 0
    names: int = 0
    long_functions: list[str] = field(default_factory=list)

    @property
    def branches_in_100_lines(self) -> float:
        return 100 * self.branches / self.code_lines

    @property
    def comprehensions_in_1000_lines(self) -> float:
        return 1000 * self.comprehensions / self.code_lines

    @property
    def share_of_dense_lines(self) -> float:
        return self.dense_lines / self.lines_with_nodes

    @property
    def names_a_line(self) -> float:
        return self.names / self.code_lines


def density_of(paths: Iterable[Path]) -> Density:
    """Count in Python files."""
    density = Density()
    for path in paths:
        _count_file(path, density)
    return density


def _count_file(path: Path, density: Density) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    docstrings = _lines_of_docstrings(tree)
    density.code_lines += _code_lines(source, docstrings)
    nodes_by_line: Counter[int] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, BRANCHES):
            density.branches += 1
        if isinstance(node, ast.comprehension):
            density.comprehensions += 1
        if isinstance(node, ast.Name):
            density.names += 1
        if (
            isinstance(node, FUNCTIONS)
            and _branches_in(node) > BRANCHES_OF_A_LONG_FUNCTION
        ):
            density.long_functions.append(f"{path.name}:{node.lineno} {node.name}")
        line = getattr(node, "lineno", None)
        if (
            line is not None
            and line not in docstrings
            and not isinstance(node, CONTEXTS)
        ):
            nodes_by_line[line] += 1
    density.lines_with_nodes += len(nodes_by_line)
    for nodes in nodes_by_line.values():
        if nodes > NODES_OF_A_DENSE_LINE:
            density.dense_lines += 1


def _lines_of_docstrings(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, DOCUMENTED)
            and ast.get_docstring(node, clean=False) is not None
        ):
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def _code_lines(source: str, docstrings: set[int]) -> int:
    count = 0
    for number, line in enumerate(source.split("\n"), 1):
        text = line.strip()
        is_code = text != "" and not text.startswith(("#", "import ", "from "))
        if is_code and number not in docstrings:
            count += 1
    return count


def _branches_in(function: ast.AST) -> int:
    return sum(isinstance(node, BRANCHES) for node in ast.walk(function))
