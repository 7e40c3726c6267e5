"""Read the command line and run one command."""

import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from rich.console import Console
from rich.markup import escape

from lightning_lora.cli import combine, compare, export, inspect, merge
from lightning_lora.errors import LoRAError, LoRAWarning

_COMMANDS: dict[str, ModuleType] = {
    "inspect": inspect,
    "merge": merge,
    "export": export,
    "compare": compare,
    "combine": combine,
}
"""Each module has a docstring, ``add_arguments(parser)`` and ``run(arguments)``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Returns:
        0: done. 1: an error, which is one line on the standard error. 2: the command line is not valid.
    """
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        return _fail("This command needs jsonargparse. Install it: pip install jsonargparse[signatures].")
    formatter = _formatter()
    parser = ArgumentParser(
        prog="lightning-lora",
        description="Work with files of LoRA adapters, without the model.",
        formatter_class=formatter,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, module in _COMMANDS.items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        about = f"{summary}\n{rest}".replace("::\n", ":\n").strip()
        command = ArgumentParser(description=about, formatter_class=formatter)
        module.add_arguments(command)
        commands.add_subcommand(name, command, help=summary)
    parsed = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always")
            _COMMANDS[parsed.command].run(parsed[parsed.command])
        for each in noticed:
            if issubclass(each.category, LoRAWarning):
                _say("[bold yellow]warning:[/]", str(each.message))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FileNotFoundError as error:
        return _fail(f"{error.filename} does not exist." if error.filename else str(error))
    except (LoRAError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("Stopped. Nothing was written.")
    return 0


def _formatter() -> type:
    """Keep the examples in a description as they are."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    return Formatter


def _fail(message: str) -> int:
    _say("[bold red]error:[/]", message)
    return 1


def _say(what: str, message: str) -> None:
    """Print one line on the standard error."""
    Console(stderr=True, soft_wrap=True).print(what, escape(message), highlight=False)
