"""Words of the command line as a command or as settings, or what is wrong with them in one line."""

# Commands are not tyro's own subcommands. Of a union, tyro builds the parsers of all commands to use one; it answers
# a misspelt command with a list instead of the nearest name; and it has to know every option beforehand, while those
# of a recipe are known once its file is read.

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, Suppress

from itpn.checkpoints.older_settings import NAMES
from itpn.commands.options import RecipeCommand
from itpn.errors import UserError
from itpn.system.checks import check_range, describe_type
from itpn.system.console import RequiredOutput, lost_output, print_note
from itpn.tasks.recipe_files import check_recipe, nearest, read_recipe

NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}
OPTION = re.compile("--?(?!inf|nan)[a-zA-Z]")
Parsed = TypeVar("Parsed")
AnyRecipeCommand = TypeVar("AnyRecipeCommand", bound=RecipeCommand)


class Field(NamedTuple):
    """A field of a command or of settings, as a user meets it."""

    attribute: str  # its name in the command, or "" in settings
    kind: Any
    hint: Any  # with the annotation's extras, a range among them
    options: tuple[str, ...]  # that set it, a flag's negation included; none where its place says which it is
    usage: str  # how a usage shows it; "" for what may be left out
    required: bool


def parse_with_recipe(cls: type[AnyRecipeCommand], words: Sequence[str], prog: str) -> AnyRecipeCommand:
    """A command whose first word is a recipe, with its own options and the settings of that recipe.

    Raises:
        UserError: no such recipe, or as :func:`parse`.
    """
    name, config = read_recipe(words[0])
    if {"-h", "--help"} & set(words):  # else with the options that change them
        check_recipe(config)
    own = {option for field in read_fields(cls) for option in field.options}
    given = tuple(option for word in words if word.startswith("--") and (option := _option(word)) not in own)
    settings: Any = Annotated[type(config), tyro.conf.arg(name="")]
    known = [
        ("recipe", Suppress[str], name),
        ("config", settings, dataclasses.field(default_factory=lambda: config)),
        ("given", Suppress[tuple[str, ...]], given),
    ]
    whole = dataclasses.make_dataclass(cls.__name__, known, bases=(cls,), frozen=True, kw_only=True)
    whole.__doc__ = cls.__doc__
    return parse(whole, words[1:], f"{prog} {shlex.quote(words[0])}")


def parse(cls: type[Parsed], words: Sequence[str], prog: str, default: Parsed | None = None) -> Parsed:
    """A command, or settings, from words.

    Args:
        prog: the words before.
        default: settings that the words change.

    Raises:
        UserError: an unknown option (the nearest is named), a value that cannot be, or something is missing.
        SystemExit: the help is printed.
    """
    fields = list(read_fields(cls))
    types = {option: field.kind for field in fields for option in field.options}
    required = [field.usage for field in fields if field.required and default is None]
    usage = " ".join(["usage:", prog, *(field.usage for field in fields if field.usage), *["[options]"][: len(types)]])
    summary, details = split_doc(cls)
    _check_values(words, types)
    complaint, shown = io.StringIO(), _Shown(sys.stdout)
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(shown):
            parsed, unknown = tyro.cli(
                cls,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=_say_true(words, types),
                prog=prog,
                description=summary,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            _print_help(shown.getvalue())
            if details:  # below the options, for tyro does not wrap it
                RequiredOutput().print("", details, sep="\n", markup=False, highlight=False)
            raise
        # an unknown option may have stood where something else was expected
        unknown = [word for word in words if OPTION.match(word) and _option(word) not in {*types, "-h", "--help"}]
        if not unknown:
            raise UserError(_translate(complaint.getvalue(), required, types, usage)) from None
    if unknown:
        raise UserError(_reject(unknown[0], types, usage))
    _note_repeats(words, fields)
    for field in fields:
        if not field.attribute:
            continue
        value = getattr(parsed, field.attribute)
        if value == () and field.required:  # tyro takes no words for several
            raise UserError(f"required: {field.usage}; {usage}")
        check_range(value, field.hint, (field.options or (field.usage,))[-1])
    return parsed


class _Shown(io.StringIO):
    """Keeps what is printed, which looks as it would on another stream: in its colours and its characters."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]  # StringIO has none
        return str(self._stream.encoding)


def _print_help(text: str) -> None:
    """Print tyro's help, with its first line, the usage, in lines as long as the window is wide.

    Raises:
        BrokenPipeError, MachineError: standard output does not take it.
    """
    line, rest = text.split("\n", 1)
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)  # codes of colours have no width
    whole = re.sub(r"\[[^\[\]]*\]|--\S+ [A-Z]+", lambda part: part[0].replace(" ", "\0"), line)
    width = shutil.get_terminal_size().columns
    lines = textwrap.wrap(
        whole, width, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False, expand_tabs=False
    )
    try:
        print("\n".join(lines).replace("\0", " "), rest, sep="\n", end="", flush=True)
    except OSError as error:
        raise lost_output(error) from error


def read_fields(cls: Any, prefix: str = "") -> Iterator[Field]:
    """All fields of a command or of settings, those of settings within settings included."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        shown: Any = next((mark for mark in marks if hasattr(mark, "metavar")), tyro.conf.arg())
        name = prefix + (field.name if shown.name is None else shown.name).replace("_", "-")
        if Suppress in marks:
            continue
        if dataclasses.is_dataclass(kind):
            yield from (inner._replace(attribute="") for inner in read_fields(kind, f"{name}." if name else ""))
            continue
        options: tuple[str, ...] = () if Positional in marks else (f"--{name}", *(shown.aliases or ()))
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        usage = " ".join([*options, shown.metavar or ""]) if required or not options else ""
        if kind is bool and FlagCreatePairsOff not in marks:
            options += ("{}{}no-{}".format(*f"--{name}".rpartition("." if "." in name else "--")),)
        yield Field(field.name, kind, hint, options, usage, required)


def split_doc(cls: Any) -> tuple[str, str]:
    """What a command does, in a line, and what else is to be known of it."""
    summary, _, details = (inspect.getdoc(cls) or "").partition("\n\n")
    return summary, re.sub(r"(?<!\n)\n(?!\n)", " ", details)


def _option(word: str) -> str:
    """The option of `--section.name=VALUE`, with hyphens."""
    return word.partition("=")[0].replace("_", "-")


def _note_repeats(words: Sequence[str], fields: Sequence[Field]) -> None:
    """Say of an option of any number of values that is given twice that the last counts, as of every option."""
    for field in fields:
        if takes_any_number(field.kind) and sum(_option(word) in field.options for word in words) > 1:
            print_note(f"{field.options[0]} is given twice, and the last counts: give all values after one")


def _check_values(words: Sequence[str], types: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for what tyro would not say clearly.

    A switch with a value, a path without a name, an option of several values without one, a bare `--`.
    """
    if "--" in words:
        raise UserError("unexpected '--': leave it out; a file whose name begins with a hyphen is written ./-NAME")
    for word, following in itertools.pairwise([*words, "--"]):
        option, equals, value = word.partition("=")
        kind = types.get(_option(word))
        if equals and kind is bool:
            raise UserError(f"{option} takes no value, not {word!r}")
        if Path in (kind, *get_args(kind)) and (value if equals else following) == "":
            raise UserError(f"{option} is empty: give a file or folder, or leave it out")
        if takes_any_number(kind) and not equals and (following == "--" or OPTION.match(following)):
            raise UserError(f"Missing value for argument '{option}'.")


def takes_any_number(kind: Any) -> bool:
    """Whether an option of this type takes any number of values."""
    return any(get_origin(part) is tuple and get_args(part)[-1] is ... for part in (kind, *get_args(kind)))


def _say_true(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """`--trainer.compile` alone means True, as it does for a setting that can be nothing but True and False."""
    said = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
        said.append(word)
        if bool in get_args(types.get(word.replace("_", "-"))) and following.startswith("--"):
            said.append("True")
    return said


def _translate(box: str, required: list[str], types: Mapping[str, Any], usage: str) -> str:
    """tyro's framed message as one line: what is wrong, without the repeated help.

    The frame is one of hyphens where standard output is not in UTF-8.
    """
    title, *lines = [re.sub(r"[│╭╮╰╯]", "", line).strip() for line in box.splitlines() or [""]]
    if "Required options" in title:
        missing = [one for one in required if one in lines] or required
        return f"required: {', '.join(missing)}; {usage}"
    begin = next((number for number, line in enumerate(lines) if not line.startswith("---")), 0)
    text = " ".join(itertools.takewhile(lambda line: not line.startswith(("─", "---")), lines[begin:]))
    text = re.sub(r"\[/?bold\]", "", text).partition(" Got errors:")[0].strip()
    if wrong := re.fullmatch(
        r"Error parsing ([^\s/]+)\S*: (invalid literal for int|could not convert string).*: ('.*')", text
    ):
        return f"{wrong[1]} must be {NUMBERS['INT' if wrong[2].endswith('int') else 'FLOAT']}, not {wrong[3]}"
    given = r"(?:no type matching .* instantiated from|.*? arguments:?) \[(.*?)\](?: into .*|\.)?"
    wrong = re.fullmatch(rf"Error parsing ([^\s/:]+)[^\s:]*: {given}", text)
    if wrong and wrong[1] in types:
        if not wrong[2]:
            return f"{wrong[1]} needs a value"
        return f"{wrong[1]} must be {describe_type(types[wrong[1]], none=False)}, not {wrong[2]}"
    text = text.replace(" Expected 1 values.", "").replace("{None}|", "")
    if choice := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)\.", text):
        value, option, known = choice.groups()
        choices = sorted(set(re.findall("'([^']*)'", known)) - {"None"})
        return f"invalid choice '{value}' for {option}: choose from {', '.join(choices)}{nearest(value, choices)}"
    return text or "the options could not be understood"


def _reject(word: str, types: Mapping[str, Any], usage: str) -> str:
    """What to say of a word that is no option, or that has no place."""
    option, known = word.partition("=")[0], list(types)
    positive = option.replace("_", "-").replace(".no-", ".", 1)
    if positive != option and bool in get_args(types.get(positive)):  # a switch that has more positions than two
        return f"unknown option {option}; did you mean {positive} False?"
    if not OPTION.match(option):
        return f"unexpected {word!r}; {usage}" + (", and options are written --name VALUE" if known else "")
    # "--batch-size" is meant as often as "--data.batchsize": compare whole names and last parts
    by_last = {name.rpartition(".")[2].removeprefix("--"): name for name in known}
    last = option.rpartition(".")[2].removeprefix("--").replace("_", "-")
    near = [name for name in known if name == _rename(option)]
    near = near or difflib.get_close_matches(option.replace("_", "-"), known, n=1, cutoff=0.8)
    near = near or [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    near = near or difflib.get_close_matches(option, known, n=1, cutoff=0.4)
    return f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _rename(option: str) -> str:
    """An option of an older version, under today's name."""
    section, _, name = option.removeprefix("--").replace("-", "_").partition(".")
    return f"--{section}.{NAMES.get(section, {}).get(name, name)}".replace("_", "-")
