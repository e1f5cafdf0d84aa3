"""docs/cli.md: every command with its options, from the parsers that the commands themselves use."""

from __future__ import annotations

import argparse
from importlib import import_module

from rqvae import scripts
from rqvae.commands import COMMANDS

INTRODUCTION = """\
# Command line

This page is generated from the code (`make docs`); a test fails where the two differ.

`python -m rqvae COMMAND ...`, or `rqvae COMMAND ...` once installed. `COMMAND --help` prints what stands here. Options
may be spelt with `-` or `_`. Commands on a config take every key of it as an option too: `--train.steps 20k`
([configuration](configuration.md)).

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a gate that was asked for failed |
| 2 | bad input: one line that names file, key or tensor, what was expected and what came |
| 3 | the run failed: not finite, disk full, lost worker |
| 130, 143 | interrupted (SIGINT, SIGTERM) after a checkpoint |
"""


def page() -> str:
    """The whole page as Markdown."""
    listing = [f"| [`{name}`](#{name}) | {line} |" for name, line in COMMANDS.items()]
    table = "\n".join(["| command | what it does |", "|---|---|", *listing, ""])
    return "\n".join([INTRODUCTION, table, *map(_command, COMMANDS), _scripts()])


def _command(name: str) -> str:
    module = import_module(f"rqvae.commands.{name.replace('-', '_')}")
    parser: argparse.ArgumentParser = module.parser()
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    rows = [f"| {_spelling(a)} | {_default(a)} | {_escaped(a.help or '')} |" for a in actions]
    words = [" ".join((text or "").split()) for text in (parser.description, parser.epilog) if text]
    table = ["| argument | default | meaning |", "|---|---|---|", *rows] if rows else ["No arguments."]
    return "\n".join([f"## {name}\n", "\n\n".join(_escaped(text) for text in words), "", *table, ""])


def _spelling(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.option_strings and action.nargs != 0 else action.dest)
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return _code(f"{value} ..." if action.nargs in ("*", "+") else value)
    flags = ", ".join(action.option_strings)
    return _code(flags if action.nargs == 0 else f"{flags} {value}")


def _code(text: str) -> str:
    # a | in a table: GitHub wants it escaped even in backticks, where Python-Markdown shows the backslash
    return f"<code>{text.replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _default(action: argparse.Action) -> str:
    if action.required and action.nargs != "*":
        return "*required*"
    empty = action.default is False or action.default in (None, argparse.SUPPRESS, [], ())
    return "" if empty else f"`{action.default}`"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def _scripts() -> str:
    rows = []
    for name, (names, command) in scripts.COMMANDS.items():
        places = " ".join([*names, *(f"[{n}]" for n in scripts.OPTIONAL)])
        rows.append(f"| `./{name} {places}` | `python -m rqvae {' '.join(command)} ...` |")
    table = "\n".join(["| script | runs |", "|---|---|", *rows])
    return f"## Scripts\n\nArguments after `--` override config keys.\n\n{table}\n"
