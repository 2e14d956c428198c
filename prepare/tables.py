"""Tables in text files, with pipes, tabs, commas or semicolons, with a header or without.

Without a header, a field means what its values are: files that exist, texts, speakers, a language, phonemes. Where that is
unclear the table is refused, with a row of it and the flag (--columns) that settles it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from common import DataError
from prepare.manifest import MAX_TEXT_BYTES, shown
from prepare.rows import AUDIO_SUFFIXES, Reading, columns_of

Rows = Iterator[tuple[str, Any]]  # (source, a row or chat, or the DataError there is instead)
Find = Callable[[str], str | None]  # the path of the clip that a table names, or None

SAMPLED = 200  # rows by which fields are judged
LANGUAGES = {
    *("zh", "en", "ja", "jp", "ko", "kr", "yue", "de", "fr", "es", "it", "pt", "ru", "nl", "pl", "cn"),
    "all_zh",
    "all_ja",
}
LABELS = {*("angry", "happy", "sad", "neutral", "surprise", "fear", "disgust", "calm"), *("m", "f", "male", "female")}
IPA = re.compile(r"[ˈˌːɹɾʁɐɜʊɪʌɡ]")
LETTERS = re.compile(r"(\S ){2,}\| .*")  # of FLEURS: t h e | f i r s t |
SPELT = re.compile(r"([a-z]+[1-5]|[A-Z]{1,2}[0-2]?)( ([a-z]+[1-5]|[A-Z]{1,2}[0-2]?))+")  # pinyin, ARPABET
MIXED = re.compile(r"(\S+ [a-z]+[1-5]\s*)+")  # characters, each with its pinyin: AISHELL-3
SENTENCE = re.compile(r"\s|[.,;:!?。，、；：！？…]|.{20}", re.DOTALL)
SIMILAR = 0.5  # ratio of SequenceMatcher: a text and its normalised form


class UnclearError(DataError):
    """A table whose fields may mean several things."""


@dataclass
class Found:
    """The form of a dataset, its rows, and what became audio, text and speaker, where the reader decides that."""

    form: str | None  # None: plain ChatML
    rows: Callable[[], Rows]
    notes: dict[str, str] = field(default_factory=dict)
    is_chat: bool = False


@dataclass
class Fields:
    """What the fields of a table mean, by their index. text: the first that is not empty counts"""

    audio: int
    text: list[int]
    speaker: int | None = None
    left_out: list[int] = field(default_factory=list)  # phonemes and the like


def read_text(path: Path) -> str:
    """raises: DataError"""
    try:
        if not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:
            raise OSError(f"it is no regular file of at most {MAX_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not blank."""
    return [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]


def read_table(path: Path, reading: Reading, find: Find) -> Found | None:
    """The rows of a table, or None if no field of it names audio.

    raises: UnclearError if the fields may mean several things; DataError for a broken table
    """
    text = read_text(path)
    first = next((line for line in text.split("\n") if line.strip()), "")
    delimiters = [d for d in "|\t" if d in first] + sorted((d for d in ",;" if d in first), key=first.count, reverse=True)
    for delimiter in delimiters:
        names = [name.strip().strip('"') for name in first.split(delimiter)]
        columns = columns_of(dict.fromkeys(names, True), reading.columns)
        if "audio" in columns and ("text" in columns or "text_file" in columns):
            _check_given(path, names, reading)
            return Found("table", lambda d=delimiter: _named_rows(path, split_cells(path, text, d), d))
    for cells in [split_cells(path, text, delimiter) for delimiter in delimiters] or _split_once(path):
        found = _unnamed_table(path, cells, reading, find)
        if found:
            return found
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Cells

Cells = list[tuple[int, list[str]]]  # (line number, cells) of each row


def split_cells(path: Path, text: str, delimiter: str) -> Cells:
    """raises: DataError for a quote that is not closed"""
    reader = _csv(text, delimiter, _quoting(text, delimiter))
    found, line = [], 1
    try:
        for cells in reader:
            if any(cells):
                found.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {line}: broken table: {error}; a quote inside a quoted text is written twice") from None
    return found


def _csv(text: str, delimiter: str, quoting: int) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)


def _quoting(text: str, delimiter: str) -> int:
    """Whether quotes are syntax. Beside pipes and tabs they often are characters, as in LJSpeech and Common Voice."""
    if delimiter not in "|\t":
        return csv.QUOTE_MINIMAL
    try:
        quoted, plain = ([row for row in _csv(text, delimiter, how) if row] for how in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE))
    except csv.Error:
        return csv.QUOTE_NONE
    is_even, is_even_plain = (len(set(map(len, rows))) == 1 for rows in (quoted, plain))
    is_all_quoted = text.count('"') >= 2 * sum(map(len, quoted)) > 0
    return csv.QUOTE_MINIMAL if is_even and ('""' in text or is_all_quoted or not is_even_plain) else csv.QUOTE_NONE


def _split_once(path: Path) -> list[Cells]:
    """A name and a text, divided by the first blank or by the first colon."""
    lines = numbered_lines(path)
    by_blank = [(number, line.strip().split(maxsplit=1)) for number, line in lines]
    by_colon = [(number, line.strip().split(":", 1)) for number, line in lines]
    return [by_blank, by_colon]


def _named_rows(path: Path, cells: Cells, delimiter: str) -> Rows:
    names = [name.strip() for name in cells[0][1]]
    for line, values in cells[1:]:
        source = f"{path} line {line}"
        if len(values) == len(names):
            yield source, {name: None if v in ("nan", "NaN") else v for name, v in zip(names, values)}
        else:
            remedy = f"a text that holds {delimiter!r} or a line break needs quotes"
            yield source, DataError(f"{len(values)} fields under a header of {len(names)}; {remedy}")


def _check_given(path: Path, names: Sequence[str], reading: Reading) -> None:
    for meaning, column in reading.columns.items():
        if column != "none" and column.lower() not in [name.lower() for name in names]:
            raise DataError(f"{path}: --columns {meaning}={column}: its columns are {', '.join(names)}")


# ---------------------------------------------------------------------------------------------------------------------
# Fields without a name


def _unnamed_table(path: Path, cells: Cells, reading: Reading, find: Find) -> Found | None:
    width = max((len(values) for _, values in cells), default=0)
    sample = [[*values, *[""] * (width - len(values))] for _, values in cells[:SAMPLED]]
    audio = _given(path, "audio", width, reading)
    if audio is None:
        audio = _audio_field(sample, find)
    if audio is None or width < 2:
        return None  # a list of clips without texts, too
    names = [name.strip() for name in sample[0]]
    has_header = len(sample) > 1 and not _is_clip(sample[0][audio], find) and _is_clip(sample[1][audio], find)
    if has_header:
        cells, sample = cells[1:], sample[1:]
    fields = _guess(path, names if has_header else None, sample, audio, reading)
    notes = {"audio": _name(audio, names, has_header), "text": " or ".join(_name(i, names, has_header) for i in fields.text)}
    if fields.speaker is not None:
        notes["speaker"] = _name(fields.speaker, names, has_header)
    labels = [_name(i, names, has_header) for i in range(width)]
    return Found("table without header", lambda: _unnamed_rows(path, cells, fields, labels, find), notes)


def _name(index: int, names: Sequence[str], has_header: bool) -> str:
    return f"column `{names[index]}`" if has_header else f"field {index + 1}"


def _given(path: Path, meaning: str, width: int, reading: Reading) -> int | None:
    """The index of a field that --columns gives by its number."""
    number = reading.columns.get(meaning, "")
    if number and number != "none" and not (number.isdecimal() and 1 <= int(number) <= width):
        raise DataError(f"{path}: --columns {meaning}={number}: its first line has {width} fields; give a number from 1")
    return int(number) - 1 if number.isdecimal() else None


def _unnamed_rows(path: Path, cells: Cells, fields: Fields, labels: Sequence[str], find: Find) -> Rows:
    meant = {fields.audio, fields.speaker, *fields.text, *fields.left_out}
    for line, values in cells:
        values = [value.strip() for value in values] + [""] * (len(labels) - len(values))
        name = values[fields.audio]
        text = next((values[index] for index in fields.text if values[index]), "")
        if MIXED.fullmatch(text):
            text = "".join(text.split()[::2])
        row = {"audio": find(name) or name, "text": text, "id": name}
        if fields.speaker is not None:
            row["speaker"] = values[fields.speaker]
        yield f"{path} line {line}", row | {labels[i]: v for i, v in enumerate(values) if i not in meant}


def _is_clip(name: str, find: Find) -> bool:
    return Path(name.strip()).suffix.lower() in AUDIO_SUFFIXES or find(name.strip()) is not None


def _audio_field(sample: Sequence[Sequence[str]], find: Find) -> int | None:
    """The first field of which most values name a clip."""
    for index, values in enumerate(zip(*sample)):
        values = [value.strip() for value in values[:50]]
        if 2 * sum(_is_clip(value, find) for value in values if value) >= len(values):
            return index
    return None


def kind_of(values: Sequence[str]) -> str:
    """What the values of a field are: empty, number, language, label, phonemes, words or name."""
    values = [value.strip() for value in values if value.strip()]

    def are(test: Callable[[str], Any], share: float) -> bool:
        return sum(bool(test(value)) for value in values) >= share * len(values)

    if not values:
        return "empty"
    if are(lambda v: re.fullmatch(r"[-\d.:\s]+", v), 1.0):
        return "number"
    if are(lambda v: v.lower() in LANGUAGES, 1.0):
        return "language"
    if are(lambda v: v.lower() in LABELS, 1.0):
        return "label"
    if are(lambda v: IPA.search(v) or SPELT.fullmatch(v) or LETTERS.fullmatch(v), 0.5):
        return "phonemes"
    return "words" if are(SENTENCE.search, 0.3) else "name"


def is_repeated(values: Sequence[str]) -> bool:
    return len(values) >= 4 and len(set(values)) <= len(values) / 2


def _guess(path: Path, names: Sequence[str] | None, sample: list[list[str]], audio: int, reading: Reading) -> Fields:
    """raises: UnclearError"""
    width = len(sample[0])
    named = columns_of(dict.fromkeys(names, True)) if names else {}
    given = {meaning: _given_or_named(path, meaning, names, named, width, reading) for meaning in ("text", "speaker")}
    columns = list(zip(*sample))
    kinds = {i: kind_of(columns[i]) for i in range(width) if i != audio}
    left = [i for i, kind in kinds.items() if kind in ("words", "name") and i != given["speaker"]]
    text = [given["text"]] if given["text"] is not None else _text_fields(columns, kinds, left)
    if not text:
        raise UnclearError(_unclear(path, names, sample, audio, kinds))
    speaker = given["speaker"]
    language = next((i for i, kind in kinds.items() if kind == "language"), None)
    if speaker is None and language is not None and text == [language + 1]:
        speaker = language - 1 if language - 1 != audio else None
    elif speaker is None and not names and reading.columns.get("speaker") != "none":
        rest = [i for i in left if i not in text]
        numbers = [i for i in kinds if _is_number_of_speaker(columns[i])]
        if len(rest) > 1:
            raise UnclearError(_unclear(path, names, sample, audio, kinds))
        speaker = rest[0] if rest else numbers[0] if len(numbers) == 1 else None
    return Fields(audio, text, speaker, [i for i, kind in kinds.items() if kind == "phonemes" and i not in text])


def _given_or_named(path: Path, meaning: str, names: Any, named: dict, width: int, reading: Reading) -> int | None:
    column = reading.columns.get(meaning) or named.get(meaning)
    if names and column in names:
        return names.index(column)
    return _given(path, meaning, width, reading)


def _is_number_of_speaker(values: Sequence[str]) -> bool:
    """Whether all values are whole numbers, and not each row has another."""
    values = [value.strip() for value in values]
    return all(value.isdecimal() for value in values) and (len(values) < 6 or len(set(values)) < len(values))


def _text_fields(columns: list[tuple], kinds: dict[int, str], left: list[int]) -> list[int]:
    """The fields of the text, the preferred one first; none if that is unclear."""
    language = next((i for i, kind in kinds.items() if kind == "language"), None)
    if language is not None and language + 1 in left:
        return [language + 1]  # path|speaker|language|text, of GPT-SoVITS and Bert-VITS2
    words = [i for i in left if kinds[i] == "words"]
    if len(words) > 1:
        words = [i for i in words if not is_repeated(columns[i])]
    if len(words) > 1:
        pairs = zip(columns[words[0]], columns[words[-1]])
        pairs = [(a[:1000].lower(), b[:1000].lower()) for a, b in list(pairs)[:20] if a.strip() and b.strip()]
        ratios = [SequenceMatcher(None, a, b).ratio() for a, b in pairs]
        is_same = len(words) == 2 and (not ratios or sum(ratios) / len(ratios) > SIMILAR)
        is_bare = not any(re.search(r"[A-Z.,;:!?。，、！？]", value) for value in columns[words[-1]])
        return (words if is_bare else words[::-1]) if is_same else []  # the second is normalised; without capitals, for ASR
    names = [i for i in left if kinds[i] == "name" and not is_repeated(columns[i])]
    return words or (names if len(left) == 1 else [])


def _unclear(path: Path, names: Sequence[str] | None, sample: list[list[str]], audio: int, kinds: dict[int, str]) -> str:
    row = " | ".join(f"{(names[i] if names else i + 1)}: {shown(value)}" for i, value in enumerate(sample[0]))
    if "phonemes" in kinds.values() and "words" not in kinds.values():
        return f"{path}: it has phonemes where the model needs the written text ({row}); to train them all the same, {_flag(names, audio)}"
    return f"{path}: unclear which field is what ({row}); {_flag(names, audio)}, or leave one out with speaker=none"


def _flag(names: Sequence[str] | None, audio: int) -> str:
    columns = names or [str(number) for number in range(1, 3)]
    others = [column for i, column in enumerate(columns) if i != audio] or ["2"]
    return f"say it with --columns audio={names[audio] if names else audio + 1},text={others[0]}"
