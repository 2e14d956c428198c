"""Command-line flags made from the fields of a dataclass, and their help; knows no setting by name.

argparse's own checks end the process at the first mistake. Here it only cuts the command line up: values are converted by
`Line.store`, so that all mistakes can be reported together.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from common import suggestion

NO_VALUE = object()
OWN = {
    "config": "read settings from YAML, or from config.json of a run; flags win",
    "help": "these lines; advanced: all settings",
    "version": "of this code, its commit, and torch",
}


@dataclass
class Line:
    """A setting as it was given, by a flag or in a file."""

    where: str
    field: dataclasses.Field | None = None
    value: Any = ""  # as it was typed; what a flag alone stands for is converted already
    problem: str = ""  # that leaves nothing to store

    def store(self, values: dict[str, Any]) -> str:
        """Put the value among `values`; returns what is wrong with it."""
        kind, choices = kind_of(self.field), self.field.metadata["choices"]
        if self.value is NO_VALUE:
            return f" needs a value: {self.field.metadata['help']}"
        if choices and self.value not in choices:
            return f" {self.value}: choose from {', '.join(choices)}"
        try:
            values[self.field.name] = self.value if isinstance(self.value, bool) else CONVERT[kind](self.value)
        except (ValueError, KeyError):
            return f" {self.value}: expected {kind}"
        return ""


BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
CONVERT: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": lambda text: BOOLS[text.lower()]}


def kind_of(f: dataclasses.Field) -> str:
    """ "int" for `int | None` too."""
    return str(f.type).split(" ")[0]


def default_of(f: dataclasses.Field) -> str:
    """The default in words; the help of a setting may give it."""
    return f.metadata["help"].partition("default: ")[2] or str(f.default)


class Flags:
    """The flags of a dataclass whose fields have `metadata`: help, aliases, const (of a flag alone) and choices.

    basic: the fields that --help lists; --help advanced lists all, under the comments that head them in the class
    """

    def __init__(self, cls: type, basic: Collection[str], description: str | None):
        self.cls, self.basic, self.description = cls, basic, description
        self.fields = {f.name: f for f in dataclasses.fields(cls)}
        self.names = {name: f for f in self.fields.values() for name in (f.name, *f.metadata["aliases"])}

    def read(self, argv: Sequence[str], version: Callable[[], str]) -> tuple[list[Line], str, list[str]]:
        """(settings, what --config names, problems). --help and --version are printed, by rank 0, and end the process."""
        given, unknown = self._parser(()).parse_known_args([_with_underscores(word) for word in argv])
        if given.help is not None or given.version:
            if os.environ.get("RANK", "0") == "0":
                print(version() if given.version else self._help(given.help))
            raise SystemExit(0)
        after = zip(unknown, ["", *unknown])  # the value of an unknown flag is no problem of its own
        words = [word.split("=")[0] for word, before in after if word.startswith("-") or not before.startswith("-")]
        problems = [f"unknown argument {word!r}{self.suggestion(word, '--')}" for word in words]
        found = {name: value for name in self.fields if (value := getattr(given, name)) is not None}
        return [Line(f"--{name}", self.fields[name], value) for name, value in found.items()], given.config, problems

    def suggestion(self, word: str, prefix: str = "") -> str:
        """The nearest name, if one is near."""
        return suggestion(word, [prefix + name for name in (*self.names, *OWN)])

    def _help(self, which: str) -> str:
        shown = self.fields if which == "advanced" else self.basic
        more = f"{len(self.fields) - len(shown)} more settings: --help advanced. " * (shown is self.basic)
        return (
            f"{self._parser(shown).format_help()}\n{more}All may stand in a file for --config; recipes/ has some, with reasons."
        )

    def _parser(self, shown: Collection[str]) -> argparse.ArgumentParser:
        """With help for the fields in `shown`."""
        usage = "bash launch.sh --train_manifest FILE --output_dir FOLDER [--FLAG VALUE ...]"
        parser = argparse.ArgumentParser(
            usage=usage, description=self.description, formatter_class=_Help, allow_abbrev=False, add_help=False
        )
        parser.add_argument("--config", metavar="FILE", default="", help=OWN["config"])
        parser.add_argument("--help", "-h", nargs="?", const="", metavar="[advanced]", help=OWN["help"])
        parser.add_argument("--version", action="store_true", help=OWN["version"])
        for heading, name in re.findall(r"^    (?:# (.+)|(\w+): )", inspect.getsource(self.cls), re.MULTILINE):
            if heading:
                group = parser.add_argument_group(heading)
            else:
                group.add_argument(*self._names_of(name), **self._argument(name, name in shown))
        return parser

    def _names_of(self, name: str) -> list[str]:
        return [f"--{alias}" for alias, f in self.names.items() if f.name == name]

    def _argument(self, name: str, is_shown: bool) -> dict[str, Any]:
        f, about = self.fields[name], self.fields[name].metadata
        parts = [about["help"]]
        parts += [f"one of {', '.join(choice or repr('') for choice in about['choices'])}"] if about["choices"] else []
        has_default = kind_of(f) != "bool" and f.default != "" and "default: " not in parts[0]
        parts += [f"default: {f.default}"] if has_default else []
        return {
            "dest": name,
            "nargs": "?",
            "const": NO_VALUE if about["const"] is None else about["const"],
            "metavar": {"int": "N", "float": "X", "bool": ""}.get(kind_of(f), "TEXT"),
            "help": "; ".join(parts).replace("%", "%%") if is_shown else argparse.SUPPRESS,
        }


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows a value as required: the parser also takes flags without theirs, so that all mistakes are reported together."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{', '.join(action.option_strings)} {action.metavar or ''}".rstrip()


def _with_underscores(word: str) -> str:
    """A flag as it is declared: hyphens are as good as underscores."""
    name, *value = word.split("=", 1)
    return "=".join(["--" + name[2:].replace("-", "_"), *value]) if word.startswith("--") else word
