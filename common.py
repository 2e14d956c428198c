"""What every file may use: errors that the user can mend, and files that are written whole. Imports nothing of ours."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

MAX_SHOWN = 20  # items of a list in one message


class UserError(ValueError):
    """A mistake that the user can mend: one clear message, exit status 2, no traceback."""


class ConfigError(UserError):
    """Settings that cannot work."""


class DataError(UserError):
    """A problem with the user's data; the message names file, record, field and remedy."""


class MissingAudioError(DataError):
    """A record names an audio file that does not exist."""


class CollateError(UserError):
    """A sample that cannot become part of a batch, or an option the checkpoint cannot serve."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another kind; the message names the path and the remedy."""


class PatchError(UserError):
    """A pattern, mode or model that the training patches cannot serve."""


class AlignmentError(UserError):
    """Labels that are neither the inputs nor the inputs one position later."""


class CopyCollapseError(UserError):
    """The model predicts its own input: it was trained on unshifted labels and will generate silence."""


class DivergenceError(UserError):
    """Losses or gradients that are no longer finite."""


class Interrupted(UserError):
    """A signal asks the run to save and end."""


def listing(title: str, items: Sequence[str]) -> str:
    """The title, then the first items, one per line, and how many more there are."""
    more = [f"... and {len(items) - MAX_SHOWN} more"] * (len(items) > MAX_SHOWN)
    return "\n  ".join([title, *items[:MAX_SHOWN], *more])


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or repr(error)).split("\n")[0]


def suggestion(word: str, choices: Iterable[str]) -> str:
    """A question that names the most similar choice, "" if none is similar."""
    return "".join(f"; did you mean {choice}?" for choice in difflib.get_close_matches(word, [*choices], 1))


def split_list(text: str) -> list[str]:
    """The items of a comma-separated list, without blanks."""
    return [item.strip() for item in text.split(",") if item.strip()]


def json_safe(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {name: json_safe(item) for name, item in value.items()}
    if isinstance(value, list):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """raises: OSError, ValueError"""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_of(file: BinaryIO) -> bytes:
    """[32] bytes: the digest of the rest of a file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 24):
        digest.update(block)
    return digest.digest()


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a binary file that gets its name only when it is whole; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # of a full disk, say, which names no file itself
        raise


def write_text(path: Path, text: str) -> None:
    """The same with a text in UTF-8, which cannot hold half of a surrogate pair: that becomes an escape."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_lines(path: Path, values: Iterable[dict]) -> None:
    """The same with JSONL."""
    lines = (f"{json.dumps(value, ensure_ascii=False)}\n" for value in values)
    write_whole(path, lambda file: file.writelines(line.encode("utf-8", "backslashreplace") for line in lines))
