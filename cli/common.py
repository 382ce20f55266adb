"""The frame of every console script: arguments, `.env`, configuration, help, and errors that a person can act on.

A script is a `Command` and two lines:

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(COMMAND, argv)

Importing this module, and `--help` and `--print-config`, load nothing heavy: `Command.run` imports its work inside.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from config import problems
from config.loading import Loaded, load, resolved, shipped, shipped_names
from config.rendering import explain, json_schema, summaries, to_toml
from trainkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, UserError

Schema = TypeVar("Schema", bound=BaseModel)

LOG_VARIABLE = "TRANSFORMERLM_LOG"


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Schema]):
    """A console script."""

    name: str
    """As it is installed, for instance `transformerlm-train`."""
    summary: str
    """What it does, in a sentence or two."""
    schema: type[Schema]
    """The schema of its configuration."""
    default_config: str
    """Shipped configuration that is used when the command line names none."""
    run: Callable[[Loaded[Schema], argparse.Namespace], int | None]
    """The work. Heavy imports belong inside it. Returns the exit code; None is success."""
    examples: Sequence[str] = ()
    """Arguments that show the common uses; `--help` prints them after the name."""
    useful: tuple[str, ...] = ()
    """Settings that `--help` shows, by dotted path."""
    flags: Mapping[str, str] = field(default_factory=dict[str, str])
    """Flags that stand for a setting: `{"--max-steps": "training.max_steps"}`."""
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    """Adds the flags that are no settings, such as `--force`; `run` finds them in its second argument."""
    adapt: Callable[[argparse.Namespace], object] = lambda arguments: None
    """Turns a flag that stands for several settings into these (`assignments`, or `layers` that these win over) and a
    configuration (`config`, `config_name`)."""


def run_command(command: Command[Any], argv: Sequence[str] | None = None) -> int:
    """Parse, load, run; returns the exit code and never raises for what the user can fix."""
    try:
        return _run(command, list(sys.argv[1:] if argv is None else argv))
    except ValidationError as error:
        for line in problems.lines(error):
            _complain(command, line)
        return EXIT_USAGE
    except UserError as error:
        _complain(command, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain(command, "interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as in `… | head`. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _run(command: Command[Any], argv: list[str]) -> int:
    parser = _Parser(command)
    arguments = parser.parse_args(parser.normalised(argv))
    load_environment(Path(".env"))
    _set_log_level()
    if arguments.help:
        _write(_help(command, parser))
    elif arguments.schema:
        _write(json.dumps(json_schema(command.schema), indent=2, ensure_ascii=False))
    elif arguments.explain is not None:
        _write(explain(command.schema, arguments.explain, _width()))
    else:
        command.adapt(arguments)
        source = configuration_file(command, arguments)
        loaded = load(command.schema, source, arguments.assignments, layers=arguments.layers)
        if arguments.print_config is None:
            return command.run(loaded, arguments) or 0
        _write(to_toml(loaded) if arguments.print_config == "toml" else json.dumps(resolved(loaded.config), indent=2))
    return 0


def configuration_file(command: Command[Any], arguments: argparse.Namespace) -> Path:
    """The file that the arguments name, or the command's own."""
    if arguments.config is None:
        return shipped(arguments.config_name or command.default_config)
    if arguments.config_name is not None:
        raise UserError(
            "Give either --config (a file) or --config-name (a shipped configuration), not both.", EXIT_USAGE
        )
    path = Path(arguments.config)
    if not path.exists() and path.name.removesuffix(".toml") in shipped_names():
        name = path.name.removesuffix(".toml")
        raise UserError(f"There is no file {path}; for the shipped configuration write --config-name {name}.")
    return path


def _write(text: str) -> None:
    print(text.rstrip("\n"), flush=True)


def counted(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def _complain(command: Command[Any], message: str) -> None:
    print(f"{command.name}: {message}", file=sys.stderr)


# -- arguments ---------------------------------------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")


class _Parser(argparse.ArgumentParser):
    """Flags with hyphens or underscores; settings bare or after `--override`, the last one wins."""

    def __init__(self, command: Command[Any]) -> None:
        super().__init__(
            prog=command.name, usage=f"{command.name} [FLAG …] [TABLE.KEY=VALUE …]", add_help=False, allow_abbrev=False
        )
        self.set_defaults(assignments=[], layers=[])
        add = self.add_argument
        add("--config", metavar="FILE", help="configuration file (TOML)")
        add("--config-name", metavar="NAME", help=f"shipped configuration: {', '.join(shipped_names())}")
        add(
            "--override",
            metavar="TABLE.KEY=VALUE",
            dest="assignments",
            action="extend",
            nargs="+",
            help="set values; TABLE.KEY=VALUE alone does the same. A value is TOML, anything else is text",
        )
        for flag, setting in command.flags.items():
            metavar = flag.lstrip("-").replace("-", "_").upper()
            add(flag, dest=setting, metavar=metavar, action=_SetSetting, help=f"same as {setting}={metavar}")
        command.add_arguments(self)
        add(
            "--print-config",
            nargs="?",
            const="toml",
            choices=("toml", "json"),
            help="print the whole configuration with the origin of each value, and do nothing else",
        )
        add(
            "--explain",
            nargs="?",
            const="",
            metavar="TABLE[.KEY]",
            help="say what the settings of a table mean; without a name, list the tables",
        )
        add("--schema", action="store_true", help="print the JSON Schema of the configuration, for editors")
        add("-h", "--help", action="store_true", help="show this help")

    def normalised(self, argv: list[str]) -> list[str]:
        """`--max_steps` becomes `--max-steps`, and a bare `a.b=c` gets an `--override` before it."""
        words: list[str] = []
        takes_next = False
        for word, following in zip(argv, [*argv, ""][1:], strict=True):
            if takes_next:
                words.append(word)
                takes_next = False
            elif word == "--override" and _ASSIGNMENT.match(following):
                pass  # each setting brings its own
            elif word.startswith("--"):
                name, equals, value = word.partition("=")
                flag = name.replace("_", "-") + equals + value
                words.append(flag)
                # A flag with an optional value (`--resume [WHICH]`) does not swallow a setting that follows it.
                action = self._option_string_actions.get(flag)
                takes_next = action is not None and action.nargs is None
            elif _ASSIGNMENT.match(word):
                words += ["--override", word]
            else:
                words.append(word)
        return words

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        arguments, rest = self.parse_known_args(args)
        if rest:
            self.error(self._unknown(rest[0]))
        return arguments

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"`{word}` is neither a flag nor a setting: settings look like training.max_steps=100"
        name, _, value = word.lstrip("-").partition("=")
        if "." in name:
            return f"settings have no dashes: write `{name.replace('-', '_')}={value or '…'}`"
        near = difflib.get_close_matches(f"--{name}", list(self._option_string_actions), n=1)
        return f"there is no flag `{word}`" + (f"; did you mean `{near[0]}`?" if near else "")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the flags)", EXIT_USAGE)


class _SetSetting(argparse.Action):
    """A flag that stands for a setting joins the other assignments, in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.assignments = [*namespace.assignments, f"{self.dest}={values}"]


# -- help --------------------------------------------------------------------------------------------------------------


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size().columns))


def _help(command: Command[Any], parser: argparse.ArgumentParser) -> str:
    width = _width()
    defaults = resolved(load(command.schema, shipped(command.default_config)).config)
    parts = [
        f"usage: {parser.usage}",
        textwrap.fill(command.summary, width),
        f"Without --config it uses the shipped configuration {command.default_config!r}.",
    ]
    if command.examples:
        parts.append(
            "\n".join(["examples:", *(f"  {command.name} {example}".rstrip() for example in command.examples)])
        )
    if command.useful:
        rows = [
            (f"{name}={_value_at(defaults, name)}", text) for name, text in summaries(command.schema, command.useful)
        ]
        parts.append("\n".join(["settings, as they stand in that configuration:", *_columns(rows, width)]))
    parts.append("\n".join(["flags (with hyphens or underscores):", *_columns(flags(command), width)]))
    parts.append(f"All settings: {command.name} --explain. Their values: {command.name} --print-config.")
    return "\n\n".join(parts)


def flags(command: Command[Any]) -> list[tuple[str, str]]:
    """Each flag as it is typed, with what it does."""
    return [(_invocation(action), str(action.help)) for action in _Parser(command)._actions if action.help]


def _invocation(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    value = action.metavar or ("|".join(action.choices) if action.choices else action.dest.upper())
    match action.nargs:
        case 0:
            return names
        case "?":
            return f"{names} [{value}]"
        case "+":
            return f"{names} {value} …"
        case "*":
            return f"{names} {value} …".lstrip()  # no flag: the words that stand alone
        case _:
            return f"{names} {value}"


def _value_at(values: Any, name: str) -> str:
    for key in name.split("."):
        values = values.get(key, "")
    return json.dumps(values, ensure_ascii=False) if not isinstance(values, str) else values


def _columns(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    indent = min(36, max(len(head) for head, _ in rows) + 4)
    lines: list[str] = []
    for head, text in rows:
        wrapped = textwrap.wrap(text, width - indent) or [""]
        if len(head) + 4 > indent:
            lines.append(f"  {head}")
            head = ""
        lines += [f"  {head:<{indent - 2}}{wrapped[0]}", *(" " * indent + line for line in wrapped[1:])]
    return lines


# -- environment -------------------------------------------------------------------------------------------------------

_VARIABLE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)")


def load_environment(path: Path) -> None:
    """Set the variables of a `.env` file (`NAME=value`, quotes and comments allowed); what is set already wins."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        return
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The file {path} cannot be read: {error}.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        variable = _VARIABLE.fullmatch(line)
        if variable is None:  # the message does not show the line, which may hold a secret
            raise UserError(f"Line {number} of {path} is not NAME=value.")
        os.environ.setdefault(variable[1], _unquoted(variable[2]))


def _unquoted(text: str) -> str:
    if quoted := re.fullmatch(r"""(["'])(.*?)\1\s*(#.*)?""", text):
        return quoted[2]
    return re.split(r"\s+#|^#", text)[0].strip()


def _set_log_level() -> None:
    name = os.environ.get(LOG_VARIABLE, "warning")
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise UserError(f"{LOG_VARIABLE}={name} is not a log level: use debug, info, warning or error.", EXIT_USAGE)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
