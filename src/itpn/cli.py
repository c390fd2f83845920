"""The command line. Torch is imported only by the commands that compute, so that mistakes are answered at once."""

import io
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from itpn import __version__
from itpn.commands.cache_features import CacheFeatures
from itpn.commands.convert import Convert
from itpn.commands.demo import Demo
from itpn.commands.evaluate import Evaluate
from itpn.commands.export import Export
from itpn.commands.info import Info
from itpn.commands.inspect import Inspect
from itpn.commands.list import List
from itpn.commands.options import RecipeCommand
from itpn.commands.parsing import parse, parse_with_recipe, split_doc
from itpn.commands.predict import Predict
from itpn.commands.shrink import Shrink
from itpn.commands.stats import Stats
from itpn.commands.train import Train
from itpn.errors import ExportFailed, MachineError, NonFiniteLoss, RunStopped, UserError
from itpn.system.accidents import guard
from itpn.system.console import RequiredOutput, finish_output, forget_warnings, print_error, silence
from itpn.system.environment import check_environment
from itpn.system.processes import GRACE, conclude, disconnect, end_children, is_first
from itpn.system.signals import stopped_by_signals
from itpn.tasks.recipe_files import nearest, read_recipe
from itpn.tasks.spec import load_installed_tasks

DESCRIPTION = "Pre-train a hierarchical vision transformer together with its feature pyramid on your own images."

MIN_COLUMNS = 20
COMMANDS: dict[str, type[Any]] = {
    "list": List,
    "info": Info,
    "train": Train,
    "cache-features": CacheFeatures,
    "stats": Stats,
    "shrink": Shrink,
    "evaluate": Evaluate,
    "predict": Predict,
    "inspect": Inspect,
    "convert": Convert,
    "export": Export,
    "demo": Demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when done, 1 for a run that went wrong, 2 for a mistake of the user's, 128 and its number after a signal.
    """
    forget_warnings()
    widen_window()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):  # its number would be that of the next file
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a terminal cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    try:
        with stopped_by_signals(), guard():
            try:
                code = run_command(arguments)
            except SystemExit:  # --help
                finish_output()
                raise
            disconnect()
            finish_output()
            return code
    except (UserError, MachineError, NonFiniteLoss, ExportFailed) as error:
        return conclude(error)
    except RunStopped as stop:
        if not stop.reported and is_first():
            print_error(f"stopped by {stop}; files that were not complete are not kept")
        end_children(GRACE)
        disconnect()
        return 128 + stop.signum
    except KeyboardInterrupt:
        end_children(GRACE)
        return 130
    except BrokenPipeError:  # `itpn list | head`
        silence(sys.stdout)
        return 0
    except BaseException:
        end_children(0)
        raise


def widen_window() -> None:
    """Let a window of a few columns, in which no help can be laid out, count as wider."""
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)


def run_command(arguments: list[str]) -> int:
    if holding := next((argument for argument in arguments if "\0" in argument), None):
        raise UserError(f"{holding!r} holds a zero byte, which no name of a file can have")
    check_environment()
    name, *words = arguments or ["--help"]
    if name in ("-h", "--help"):
        print_help()
    elif name == "--version":
        print(f"itpn {__version__}")
    elif name in COMMANDS:
        command = parse_command(name, words)
        if hasattr(command, "task_file"):
            load_installed_tasks()  # whose checkpoints may be named
        command.run()
    else:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(f"no {kind} {name!r}{nearest(name, list(COMMANDS))} (see itpn --help)")
    return 0


def print_help() -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"  {name}", split_doc(command)[0])
    usage = "usage: itpn [-h] [--version] COMMAND [options]"
    end = "\nitpn COMMAND --help lists the options of a command."
    RequiredOutput().print(usage, "", DESCRIPTION, "", "commands:", table, end, sep="\n", markup=False, highlight=False)


def parse_command(name: str, words: list[str]) -> Any:
    """A command as the words after its name have it."""
    command, prog = COMMANDS[name], f"itpn {name}"
    if "task_file" in command.__dataclass_fields__:
        import_task(words)
    if issubclass(command, RecipeCommand) and words and words[0] not in ("-h", "--help"):
        if words[0].startswith("-"):
            raise UserError(f"the recipe comes first: {prog} RECIPE {words[0]} ...")
        return parse_with_recipe(command, words, prog)
    return parse(command, words, prog)


def import_task(words: list[str]) -> None:
    """Import the recipe file of a task of the user's own, `--recipe FILE`, which registers it."""
    for word, following in itertools.pairwise([*words, None]):
        option, equals, value = str(word).partition("=")
        given = value if equals else following
        if option == "--recipe" and given is not None:
            read_recipe(given)
