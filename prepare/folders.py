"""Folders of recordings: what is in them, which text belongs to which clip, and which folder names a speaker.

Listing        the files of a folder; finds the clip that a table names
read_kaldi     wav.scp and text, and where they exist utt2spk and segments
read_lists     tables anywhere in the folder whose rows name clips of it: LJSpeech, LibriSpeech, AISHELL-3, MLS, CSS10, ...
read_beside    a text file for each clip, beside it or in a folder of texts: LibriTTS, VCTK, .lab
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from common import DataError
from prepare.rows import (
    AUDIO_FOLDERS,
    AUDIO_SUFFIXES,
    DEFAULT_READING,
    SPLIT,
    STORAGE,
    WAVEFORM_SUFFIXES,
    MissingTextError,
    Reading,
    check_inside,
    columns_of,
)
from prepare.tables import LABELS, Found, Rows, UnclearError, numbered_lines, read_table, read_text
from prepare.timed import Segment, read_timed, timed_rows

TEXT_SUFFIXES = (".normalized.txt", ".txt", ".lab", ".json", ".original.txt")  # of a clip's text, the preferred one first
LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".list", ".lst")
USUAL_TABLES = ("content.txt", "metadata.csv", "transcripts.txt", "transcript_utf8.txt", "transcript.txt", "validated.tsv")
NOTES = re.compile(r"(readme|licen[sc]e|speakers|spk|notes|changelog|copyright|requirements)", re.IGNORECASE)
SPLIT_IN_NAME = re.compile(r"(?:^|[_.-])(train|dev|test|val|valid|validation|eval)(?![a-z])", re.IGNORECASE)
MICROPHONE = re.compile(r"_mic(\d)$")  # of VCTK, which has every sentence from two microphones
CHAPTER = re.compile(r"(chapter|ch|disc|cd|part|batch|session|ep|episode|vol|volume|take)[ _-]?\d+", re.IGNORECASE)
AUDIO_PLACES = [f"{folder}/" for folder in AUDIO_FOLDERS]
MAX_FILES = 2_000_000
PEEKED = 20  # files of a kind that are opened to see whether they have times


class Listing:
    """The files below a folder, as relative paths with /. Hidden files, and those that macOS adds to archives, are left out."""

    def __init__(self, root: Path, reading: Reading = DEFAULT_READING):
        self.root = root
        self.files: list[str] = []
        waiting = [("", False)]  # folders, each with whether a link leads there
        while waiting:
            place, is_linked = waiting.pop()
            try:
                with os.scandir(root / place) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
                folders = [self._add(entry, place, is_linked, reading) for entry in entries if not entry.name.startswith(".")]
            except OSError as error:
                raise DataError(f"{root / place}: cannot be read: {error}") from None
            waiting += filter(None, reversed(folders))
            if len(self.files) > MAX_FILES or place.count("/") > 30:
                raise DataError(
                    f"{root}: more than {MAX_FILES} files, or folders that contain themselves; name a smaller folder"
                )

    def _add(self, entry: os.DirEntry, place: str, is_linked: bool, reading: Reading) -> tuple[str, bool] | None:
        """Note a file, or return a folder to look into. raises: DataError for a text that is not the dataset's own"""
        path, is_linked = Path(entry.path), is_linked or entry.is_symlink()
        if entry.is_dir():
            if entry.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
                raise DataError(f"{path}: a link to a folder that contains it; take it out")
            return None if entry.name.startswith("__MACOSX") else (f"{place}{entry.name}/", is_linked)
        self.files.append(place + entry.name)
        if not entry.name.lower().endswith(AUDIO_SUFFIXES) and path.exists() and (is_linked or not entry.is_file()):
            try:
                check_inside(path, self.root, reading)
            except OSError as error:
                raise DataError(f"{path}: {error}") from None
        return None

    @functools.cached_property
    def clips(self) -> list[str]:
        clips = [path for path in self.files if path.lower().endswith(AUDIO_SUFFIXES)]
        second = {path for path in clips if (found := MICROPHONE.search(stem_of(path))) and found[1] != "1"}
        return [path for path in clips if path not in second]

    @functools.cached_property
    def by_stem(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for path in self.clips:
            found[stem_of(path)].append(path)
        return found

    def with_suffix(self, *suffixes: str) -> list[str]:
        return [path for path in self.files if path.lower().endswith(suffixes)]

    def __contains__(self, path: str) -> bool:
        return path in self._set

    @functools.cached_property
    def _set(self) -> set[str]:
        return set(self.files)


def stem_of(path: str) -> str:
    """A file's name without its suffix, of which texts may have two: x.normalized.txt."""
    name = path.rpartition("/")[2]
    suffix = next((s for s in TEXT_SUFFIXES if name.lower().endswith(s)), PurePosixPath(name).suffix)
    return name.removesuffix(name[len(name) - len(suffix) :]) if suffix else name


class Finder:
    """Finds the clip that a table names: by its path or without its suffix, in the usual folders, or by its name anywhere.

    base: the table's folder, from `root`; listing: None where only paths count
    """

    def __init__(self, root: Path, base: str = "", listing: Listing | None = None):
        self.root, self.listing = root, listing
        self.places = [f"{place}{folder}" for place in ([f"{base}/", ""] if base else [""]) for folder in ("", *AUDIO_PLACES)]
        self.known = ("", "")  # folder and suffix that fitted last

    def __call__(self, name: str) -> str | None:
        name = name.strip().replace("\\", "/")
        if not name or "\0" in name or len(name) > 1000:
            return None
        place, suffix = self.known
        if self._is_file(place + name + suffix):
            return place + name + suffix
        has_suffix = name.lower().endswith(AUDIO_SUFFIXES)
        for suffix in ("",) if has_suffix else AUDIO_SUFFIXES:
            for place in self.places:
                if self._is_file(place + name + suffix):
                    self.known = (place, suffix)
                    return place + name + suffix
        found = self.listing.by_stem.get(stem_of(name), []) if self.listing else []
        named = [path for path in found if path.endswith(f"/{name}")] or found
        return named[0] if len(named) == 1 else None

    def _is_file(self, path: str) -> bool:
        if self.listing and not os.path.isabs(path):
            return path in self.listing
        try:
            return (self.root / path).is_file()
        except OSError:
            return False


# ---------------------------------------------------------------------------------------------------------------------
# Speakers


def speaker_folders(clips: Sequence[str]) -> tuple[int | None, str]:
    """(index of the folder that names the speaker, or None; a note on it).

    Folders such as wavs/ and train/ name nobody. Where several are left, it is the one that the clips' names begin with.
    raises: UnclearError
    """
    folders = [path.split("/")[:-1] for path in clips]
    depth = min(map(len, folders), default=0)
    levels = [level for level in range(depth) if not all(_is_no_speaker(parts[level]) for parts in folders)]
    if not levels:
        return None, "no folder names a speaker"
    named = [level for level in levels if all(stem_of(path).startswith(parts[level]) for path, parts in zip(clips, folders))]
    levels = named[:1] or levels
    names = {parts[levels[0]] for parts in folders}
    if len(levels) == 1 and not all(CHAPTER.fullmatch(name) or name.lower() in LABELS for name in names):
        return levels[0], f"folder {levels[0] + 1} of the clip's path"
    seen = ", ".join(sorted({"/".join(parts) for parts in folders})[:3])
    raise UnclearError(
        f"unclear which folder is the speaker ({seen}); say it with --speaker_from folder:1, --speaker NAME, or --speaker none"
    )


def _is_no_speaker(name: str) -> bool:
    return bool(STORAGE.fullmatch(name) or SPLIT.fullmatch(name))


def split_of(path: str) -> str | None:
    """The split that a folder or the file itself is named after."""
    parts = [*path.split("/")[:-1], stem_of(path)]
    return next((part for part in parts if SPLIT.fullmatch(part)), None)


def speaker_in(clips: Sequence[str], reading: Reading) -> tuple[Callable[[str], str | None], str]:
    """(the speaker of a clip by its path, a note on it). raises: UnclearError"""
    if reading.speaker or reading.speaker_from is not None or "speaker" in reading.columns:
        return lambda path: None, "as given"
    level, note = speaker_folders(clips)
    return lambda path: None if level is None else path.split("/")[level], note


# ---------------------------------------------------------------------------------------------------------------------
# Tables in a folder


def read_lists(listing: Listing, reading: Reading) -> Found | None:
    """The tables of a folder that name clips of it. raises: DataError if several do and it is unclear which counts"""
    tables, problems = {}, []
    for path in listing.with_suffix(*LIST_SUFFIXES):
        if stem_of(path) in listing.by_stem or NOTES.match(path.rpartition("/")[2]):
            continue
        find = Finder(listing.root, path.rpartition("/")[0], listing)
        try:
            found = read_table(listing.root / path, reading, find)
        except UnclearError as error:
            problems.append(str(error))
            continue
        if found:
            tables[path] = found
    if not tables and problems:
        raise UnclearError(problems[0])
    chosen = _choose(listing.root, tables, reading)
    if not chosen:
        return None
    forms = {tables[path].form for path in chosen}
    notes = tables[chosen[0]].notes
    by_path, note = (None, "") if "speaker" in notes or forms == {"table"} else speaker_in(listing.clips, reading)
    form = "LJSpeech" if chosen == ["metadata.csv"] and forms == {"table without header"} else forms.pop()
    notes = notes | ({"speaker": note} if by_path else {})
    return Found(
        form, lambda: _rows_of_lists(listing, {path: tables[path] for path in chosen}, by_path, reading.columns), notes
    )


def _choose(root: Path, tables: dict[str, Found], reading: Reading) -> list[str]:
    """Of each folder its one table, the one with a usual name, or those of its splits. raises: DataError"""
    folders = defaultdict(list)
    for path in tables:
        folders[path.rpartition("/")[0]].append(path)
    chosen = []
    for paths in folders.values():
        usual = [path for name in USUAL_TABLES for path in paths if path.rpartition("/")[2] == name]
        splits = [path for path in paths if split_of_table(path)]
        if reading.split and any(split_of_table(path) == reading.split for path in splits):
            chosen += [path for path in splits if split_of_table(path) == reading.split]
        elif len(paths) == 1 or usual:
            chosen += usual[:1] or paths
        elif len(splits) == len(paths) == len({split_of_table(path) for path in paths}):
            chosen += paths
        else:
            raise UnclearError(f"{root}: {', '.join(paths)} all name clips; give the one that counts: {root / paths[0]}")
    return chosen


def split_of_table(path: str) -> str | None:
    found = SPLIT_IN_NAME.search(stem_of(path))
    return found[1] if found else None


def _rows_of_lists(listing: Listing, tables: dict[str, Found], speaker: Callable | None, given: dict[str, str]) -> Rows:
    for path, found in tables.items():
        split = split_of_table(path) or split_of(path)
        find = Finder(listing.root, path.rpartition("/")[0], listing)
        for source, row in found.rows():
            columns = columns_of(row, given) if isinstance(row, dict) else {}
            if "audio" in columns:
                clip = row[columns["audio"]] = find(row[columns["audio"]]) or row[columns["audio"]]
                row |= {"split": split} if split and "split" not in row else {}
                row |= {"speaker": speaker(clip)} if "speaker" not in columns and speaker and clip in listing else {}
            yield source, row


# ---------------------------------------------------------------------------------------------------------------------
# A text for each clip


def read_beside(listing: Listing, reading: Reading) -> Found | None:
    """Clips whose texts are files of the same name; None if fewer than half of the clips have one."""
    texts = _texts(listing)
    num_texts = sum(_key(clip) in texts for clip in listing.clips)
    if not num_texts or 2 * num_texts < len(listing.clips):
        return None
    speaker, note = speaker_in(listing.clips, reading)
    suffixes = Counter(path[len(path.rpartition("/")[0]) :].partition(".")[2] for path in texts.values())
    notes = {"audio": "each clip", "text": f"the .{suffixes.most_common(1)[0][0]} of its name", "speaker": note}
    return Found("pairs", lambda: _rows_beside(listing, texts, speaker), notes)


def _texts(listing: Listing) -> dict[tuple, str]:
    """The files of texts, by the `_key` of their clips."""
    texts: dict[tuple, str] = {}
    for suffix in reversed(TEXT_SUFFIXES):
        texts |= {_key(path): path for path in listing.with_suffix(suffix)}
    return texts


def without_text(listing: Listing) -> list[str]:
    """The waveforms that have no text of their name."""
    texts = _texts(listing)
    return [clip for clip in listing.clips if clip.lower().endswith(WAVEFORM_SUFFIXES) and _key(clip) not in texts]


def _key(path: str) -> tuple[str, ...]:
    """By which clips and texts belong together: folders without wavs/, txt/ and the like, and the name."""
    return (*(part for part in path.split("/")[:-1] if not STORAGE.fullmatch(part)), MICROPHONE.sub("", stem_of(path)))


def _rows_beside(listing: Listing, texts: dict[tuple, str], speaker: Callable[[str], str | None]) -> Rows:
    for clip in listing.clips:
        source, key = str(listing.root / clip), _key(clip)
        row = {"audio": clip, "speaker": speaker(clip), "split": split_of(clip), "id": "/".join(key)}
        text = texts.get(key)
        if text and text.endswith(".json"):
            try:
                value = json.loads(read_text(listing.root / text))
            except (ValueError, RecursionError) as error:
                yield source, DataError(f"{text}: broken JSON: {error}")
                continue
            value = value if isinstance(value, dict) else {}
            inside = columns_of(value)
            row |= {name: value[inside[name]] for name in ("text", "speaker") if name in inside}
        elif text:
            row["text_file"] = text
        command = f"bash launch.sh prepare transcribe {listing.root}"
        yield source, row if text else MissingTextError(f"no {stem_of(clip)}.txt beside it; {command} writes it")


def read_timed_beside(listing: Listing, reading: Reading) -> Found | None:
    """Recordings with a transcript of the same name that has times; None if there is none."""
    clip_of = {_key(clip): clip for clip in listing.clips}
    found: dict[str, tuple[Path, list[Segment]]] = {}  # clip -> its transcript
    for suffix in (".srt", ".vtt", ".textgrid", ".json", ".txt"):
        beside = [(path, clip_of[_key(path)]) for path in listing.with_suffix(suffix) if _key(path) in clip_of]
        if any(read_timed(listing.root / path) for path, _ in beside[:PEEKED]):
            for path, clip in beside:
                segments = read_timed(listing.root / path)
                if segments and clip not in found:  # of several kinds the first counts
                    found[clip] = (listing.root / path, segments)
    if not found:
        return None
    speaker, note = speaker_in(list(found), reading)
    notes = {"audio": "the recordings", "text": "the segments beside them", "speaker": f"of the segment, or {note}"}
    rows = (timed_rows(path, clip, segments, speaker(clip)) for clip, (path, segments) in found.items())
    return Found("transcripts with times", lambda: itertools.chain.from_iterable(rows), notes)


# ---------------------------------------------------------------------------------------------------------------------
# Kaldi

# Commands that only decode a file, which is then read itself: flac -c -d -s a.flac |, sph2pipe -f wav a.sph |, sox a.wav -t wav - |
NAME = r"([^\s|;&$`<>-][^\s|;&$`<>]*)"
KALDI_PIPE = re.compile(
    rf"flac (?:-[cds]+ )+{NAME} \|"
    rf"|sph2pipe (?:-f \w+ |-p |-c (?P<channel>[12]) )*{NAME} \|"
    rf"|sox {NAME} (?:-[rtbec] [\w-]+ )*- \|"
)

KaldiTable = dict[str, tuple[int, str]]  # key -> (line number, rest of the line)


def read_kaldi(folder: Path, reading: Reading) -> Rows:
    tables = {name: _kaldi_table(folder / name, folder, reading) for name in ("wav.scp", "text", "utt2spk", "segments")}
    for name in ("wav.scp", "text"):
        if not tables[name]:
            raise DataError(f"{folder / name}: missing or empty; a Kaldi folder has wav.scp and text")
    return _kaldi_rows(folder, tables)


def _kaldi_rows(folder: Path, tables: dict[str, KaldiTable]) -> Rows:
    for utterance, (line, text) in tables["text"].items():
        yield f"{folder / 'text'} line {line}", _kaldi_row(utterance, text, tables)
    listed = "segments" if tables["segments"] else "wav.scp"
    for utterance, (line, _) in tables[listed].items():
        if utterance not in tables["text"]:
            problem = f"{utterance!r} has no line in text; add it, or take this one out"
            yield f"{folder / listed} line {line}", DataError(problem)


def _kaldi_row(utterance: str, text: str, tables: dict[str, KaldiTable]) -> dict | DataError:
    recording, span = utterance, {}
    if tables["segments"]:
        fields = tables["segments"].get(utterance, (0, ""))[1].split()
        if len(fields) < 3:
            return DataError(f"{utterance!r} has no line `utterance recording start end` in segments")
        recording, start, end = fields[:3]
        span = {"offset": start} | ({} if end.startswith("-") else {"end": end})  # -1: up to the recording's end
    audio = tables["wav.scp"].get(recording, (0, ""))[1]
    if not audio:
        return DataError(f"{recording!r} has no line in wav.scp")
    if audio.endswith("|"):
        named = KALDI_PIPE.fullmatch(audio)
        if not named:
            return DataError(f"wav.scp gives a command for {recording!r}; commands are not run: write the audio to a file")
        span |= {"channel": {"1": "left", "2": "right"}[named["channel"]]} if named["channel"] else {}
        audio = named[1] or named[3] or named[4]
    return {"audio": audio, "text": text, "speaker": tables["utt2spk"].get(utterance, (0, None))[1], **span}


def _kaldi_table(path: Path, folder: Path, reading: Reading) -> KaldiTable:
    """raises: DataError for a key that occurs twice"""
    table: KaldiTable = {}
    try:
        if path.exists():
            check_inside(path, folder, reading)
    except OSError as error:
        raise DataError(f"{path}: {error}") from None
    for number, line in numbered_lines(path) if path.is_file() else ():
        key, rest = (line.split(maxsplit=1) + [""])[:2]
        if key in table:
            raise DataError(f"{path} line {number}: {key!r} was used before, in line {table[key][0]}; give each its own")
        table[key] = (number, rest.strip())
    return table
