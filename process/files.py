"""Settings in files: YAML with a setting on each line, or config.json of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from process.flags import Flags, Line, default_of


def read_lines(path: Path, flags: Flags, facts: Collection[str]) -> Iterator[Line]:
    """The settings in a file; one without a value (null) keeps its default.

    Values are taken as they are typed, as on the command line: to YAML `no` would be a boolean and 2e-4 a text.

    facts: what JSON may hold beside settings
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        yield Line(f"--config {path}: ", problem=f"cannot be read: {' '.join(str(error).split())}")
        return
    if not isinstance(root, yaml.MappingNode):
        yield Line(f"--config {path}: ", problem="expected lines like lora_r: 16")
        return
    seen: set[str] = set()
    for key, node in root.value:
        name, where = str(key.value).replace("-", "_"), f"{path} line {key.start_mark.line + 1}: "
        f = flags.names.get(name)
        if path.suffix == ".json" and name in facts:
            continue
        if f is None:
            yield Line(where, problem=f"unknown setting {name!r}{flags.suggestion(name)}")
        elif f.name in seen:
            yield Line(where, problem=f"{name} is given twice")
        elif isinstance(node, yaml.SequenceNode):
            yield Line(where, problem=f"{name} is a list; write its items with commas between them")
        elif isinstance(node, yaml.MappingNode):
            yield Line(where, problem=f"{name} has settings below it; write each at the left edge")
        elif not node.tag.endswith(":null"):
            yield Line(f"{where}{name}", f, node.value)
        seen |= {f.name} if f else set()


def as_line(f: dataclasses.Field, value: Any) -> str:
    """A setting as `read_lines` reads it, with its default beside it."""
    line = yaml.safe_dump({f.name: value}, width=math.inf, allow_unicode=True).strip()
    default = default_of(f)
    return f"{line}  # default: {default}\n" if default else f"{line}\n"
