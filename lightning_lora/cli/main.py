"""Read the command line and run one command."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.markup import escape

from lightning_lora.cli import combine, export, inspect, merge, readers
from lightning_lora.errors import LoRAError, LoRAWarning
from lightning_lora.printing import fitting_console, printable


class _Command(Protocol):
    """A module with a command, whose docstring is the help."""

    __name__: str
    __doc__: str | None

    def add_arguments(self, parser: Any) -> None:
        """Add the arguments of the command."""
        ...

    def run(self, arguments: Any) -> str | None:
        """Do the work. Return a line to print, or None if the command has printed."""
        ...


_COMMANDS: tuple[_Command, ...] = (inspect, merge, export, readers, combine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Return 0, or 1 after an error. Arguments that are not known end Python with 2.
    """
    return _run_and_report(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    about = "Work with files of LoRA adapters, without the model."
    # no file inside of the package imports the package itself: sys.modules has it
    version = f"%(prog)s {sys.modules['lightning_lora'].__version__}"
    parser = argparse.ArgumentParser(prog="lightning-lora", description=about)
    parser.add_argument("--version", action="version", version=version)

    def show_help(_: argparse.Namespace) -> None:
        parser.print_help()

    parser.set_defaults(run=show_help, usage="")  # without a command
    commands = parser.add_subparsers(metavar="command")
    for module in _COMMANDS:
        _add_command(commands, module)
    return parser


def _add_command(commands: Any, module: _Command) -> None:
    """Add a command to the parser.

    Its arguments then have ``run`` and ``usage`` too, with which :func:`_run_command`
    runs it.
    """
    _, _, name = module.__name__.rpartition(".")
    text = module.__doc__ or ""
    first_line, _, _ = text.partition("\n")
    description = text.replace("::\n", ":\n").strip()
    keep_lines = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        name, help=first_line, description=description, formatter_class=keep_lines
    )
    module.add_arguments(command)
    usage = command.format_usage().strip().removeprefix("usage: ")
    command.set_defaults(run=module.run, usage=usage)


def _run_and_report(command: argparse.Namespace) -> int:
    """Run a command, then print its warnings and why it failed.

    Return the exit code.
    """
    try:
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", LoRAWarning)  # Python asks this one first
            failure = _run_command(command)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    for each in noticed:
        _say("[bold yellow]warning:[/]", str(each.message))
    if failure is None:
        return 0
    if failure.usage:
        _say("[dim]usage:[/]", failure.usage)
    _say("[bold red]error:[/]", failure.message)  # last, where it is read
    return 1


@dataclass(frozen=True)
class _Failure:
    """Why a command has failed."""

    message: str
    usage: str = ""  # how the command is called, if that may help


def _run_command(command: argparse.Namespace) -> _Failure | None:
    """Run a command and print its result, or return why it has failed."""
    try:
        result: str | None = command.run(command)
        if result:
            fitting_console().print(
                printable(result), markup=False, highlight=False, soft_wrap=True
            )
        sys.stdout.flush()
    except BrokenPipeError:  # an OSError too, but no failure
        raise
    except FileNotFoundError as error:
        if not error.filename:  # a message of ours, which says what to do
            return _Failure(str(error))
        return _Failure(f"{error.filename} does not exist.", command.usage)
    except (LoRAError, OSError) as error:
        return _Failure(str(error), command.usage)
    except KeyboardInterrupt:
        return _Failure("Stopped. Nothing was written.")
    return None


def _say(what: str, message: str) -> None:
    """Print a message on the standard error."""
    console = fitting_console(stderr=True)
    lines = [printable(line) for line in message.splitlines()]
    text = escape("\n".join(lines))
    console.print(what, text, highlight=False, soft_wrap=not console.is_terminal)
