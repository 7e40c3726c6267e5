"""Read the command line and run one command."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from rich.markup import escape

from lightning_lora.cli import combine, export, inspect, merge
from lightning_lora.errors import LoRAError, LoRAWarning
from lightning_lora.printing import fitting_console, printable

_COMMANDS = (inspect, merge, export, combine)  # the docstring of each is its help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return 0, or 1 after an error."""
    about = "Work with files of LoRA adapters, without the model."
    parser = argparse.ArgumentParser(prog="lightning-lora", description=about)
    parser.add_argument("--version", action="version", version=f"%(prog)s {sys.modules['lightning_lora'].__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in _COMMANDS:
        text = module.__doc__ or ""
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=text.partition("\n")[0],
            description=text.replace("::\n", ":\n").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, usage=command.format_usage().strip().removeprefix("usage: "))
    return _run(parser.parse_args((sys.argv[1:] if arguments is None else arguments) or ["--help"]))


def _run(parsed: argparse.Namespace) -> int:
    usage = message = ""
    try:
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always")
            if said := parsed.run(parsed):
                fitting_console().print(printable(said), markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FileNotFoundError as error:
        usage = parsed.usage if error.filename else ""
        message = f"{error.filename} does not exist." if error.filename else str(error)
    except (LoRAError, OSError) as error:
        usage, message = parsed.usage, str(error)
    except KeyboardInterrupt:
        message = "Stopped. Nothing was written."
    for each in noticed:
        if issubclass(each.category, LoRAWarning):
            _say("[bold yellow]warning:[/]", str(each.message))
    if usage:
        _say("[dim]usage:[/]", usage)
    if message:  # last, where it is read
        _say("[bold red]error:[/]", message)
    return 1 if message else 0


def _say(what: str, message: str) -> None:
    """Print a message on the standard error."""
    console = fitting_console(stderr=True)
    message = "\n".join(map(printable, message.splitlines()))
    console.print(what, escape(message), highlight=False, soft_wrap=not console.is_terminal)
