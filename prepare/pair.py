"""References for zero-shot cloning, and train / val / test without leaks.

    bash launch.sh prepare pair lines.jsonl paired --val_share 0.02 --test_share 0.02

A plain line (a text, its audio and a `speaker`) gets another line of the same speaker as its reference: as an earlier
exchange (`turn`) or in the system turn (`system`), as the official inference does; a share of all lines gets the official
scene. A line with a system turn of its own keeps it, and its reference is an earlier exchange. All other records stay as
they are.

Records that share audio (the same content, overlapping parts of a file) or a speaker's text go into one split, and a
reference comes from the split of its line. So val and test hold nothing that training has seen. Held-out lines are taken a
few at a time from each speaker, so that they have references too. The same seed gives the same files.

Writes train.jsonl, val.jsonl and test.jsonl (unless empty), and leakage.json, which is computed from these files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from boson_multimodal.data_types import AudioContent, Message, TextContent

from common import DataError, sha256_of, split_list, write_whole
from prepare import prompts
from prepare.convert import move_paths
from prepare.forms import open_manifest
from prepare.manifest import AudioPart, Manifest, Record, check
from prepare.prompts import Phrasing, Voice
from prepare.rows import Reading

SPLITS = ("train", "val", "test")
STYLES = ("turn", "system")
TOUCHING_SEC = 0.001  # spans may overlap by this much: seconds in manifests are rounded

T = TypeVar("T")
Source = str | tuple[int, str]  # of clips: a file's path, or size and digest of `raw_audio`
Span = tuple[Source, float, float]  # a clip: its source, start and end in seconds


@dataclass
class Line:
    """A record, as far as pairing needs it."""

    index: int  # in the manifest
    speaker: str | None
    texts: list[str]  # of `transcripts`, words only
    context: list[Span]
    targets: list[Span]  # the clips that train, and their label audio
    is_plain: bool  # one transcript and its clip: can have a reference, and be one
    group: int = -1  # records of one group go into one split
    split: str = "train"

    @property
    def spans(self) -> list[Span]:
        return self.context + self.targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="a dataset in any known form (docs/datasets.md)")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ref_per_line", type=int, default=1, help="records made of each line, with different references")
    parser.add_argument("--ref_drop", type=float, default=0.1, help="share of records that get no reference")
    parser.add_argument("--styles", default="turn=0.7,system=0.3", help="where references go, as shares")
    parser.add_argument(
        "--scene_share", type=float, default=Phrasing.scene_share, help="share of records with the official scene"
    )
    parser.add_argument("--val_share", type=float, default=0.02, help="share of the input's records for val.jsonl")
    parser.add_argument("--test_share", type=float, default=0.0, help="share of the input's records for test.jsonl")
    parser.add_argument(
        "--hold_out_speakers",
        default="",
        help="speakers that are only in test.jsonl: how many, or their names a,b,c (a name that is a number: 1034,)",
    )


def run(args: argparse.Namespace) -> int:
    styles = parse_styles(args.styles)
    if args.ref_per_line < 1 or not (0 <= args.ref_drop <= 1 and 0 <= args.scene_share <= 1):
        raise DataError("--ref_per_line is 1 or more, --ref_drop between 0 and 1, --scene_share too")
    if not (min(args.val_share, args.test_share) >= 0 and args.val_share + args.test_share < 1):
        raise DataError("--val_share and --test_share leave nothing to train on, or are negative")
    refuse_used(args.output_dir)
    manifest, _ = check(open_manifest(args.input, reading=Reading(phrasing=None))[0])
    lines = list(read_lines(manifest))
    group_lines(lines)
    shares = {"test": args.test_share, "val": args.val_share}
    split_lines(lines, shares, find_speakers(lines, args.hold_out_speakers, args.seed), args.seed)
    counts = write_splits(manifest, lines, styles, args)
    report = {"written": counts, "not filled": find_short(lines, shares), **find_leaks(args.output_dir)}
    write_whole(args.output_dir / "leakage.json", lambda file: file.write((json.dumps(report, indent=2) + "\n").encode()))
    show_report(report, args.output_dir)
    return 1 if report["leaks"] else 0


def parse_styles(spec: str) -> dict[str, float]:
    """{"turn": 0.7, "system": 0.3} from "turn=0.7,system=0.3"."""
    try:
        styles = {name.strip(): float(weight) for name, weight in (item.split("=") for item in spec.split(","))}
    except ValueError:
        raise DataError(f"--styles {spec}: expected turn=0.7,system=0.3") from None
    if not set(styles) <= set(STYLES) or not all(0 <= w < math.inf for w in styles.values()) or sum(styles.values()) <= 0:
        raise DataError(f"--styles {spec}: the styles are {' and '.join(STYLES)}, their weights positive")
    return styles


def refuse_used(folder: Path) -> None:
    """raises: DataError if files would be replaced: the input, or splits made by hand"""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: this is a file; name a folder for the splits")
    found = [name for name in (*(f"{split}.jsonl" for split in SPLITS), "leakage.json") if (folder / name).exists()]
    if found:
        raise DataError(f"{folder}: holds {', '.join(found)} already; choose another folder, or delete what is there")


# ---------------------------------------------------------------------------------------------------------------------
# What is the same


def read_lines(manifest: Manifest) -> Iterator[Line]:
    for index, record in enumerate(manifest):
        texts = transcripts(record)
        num_before = len(record.cropped(record.chatml.start_index or 0).audio)
        context, targets = [], []
        for number, part in enumerate(record.audio):
            spans = targets if part.is_output and number >= num_before else context
            spans += [span_of(clip) for clip in (part, part.label) if clip is not None]
        is_plain = len(texts) == len(record.audio) == 1
        yield Line(index, record.chatml.speaker, [words(text) for text in texts], context, targets, is_plain)


def transcripts(record: Record) -> list[str]:
    """The transcripts of a line, or of a reference (an earlier exchange) and a line, perhaps after a system turn.

    Empty for any other record: in a dialogue the user's texts may be prompts, not transcripts.
    """
    turns = record.chatml.messages
    start = len(turns) - 1
    turns = turns[turns[0].role == "system" :]
    if len(turns) != 2 and not (len(turns) == 4 and record.chatml.start_index == start):
        return []
    exchanges = list(zip(turns[::2], turns[1::2]))
    texts = [sole_text(user.content) for user, _ in exchanges]
    return texts if all(map(is_exchange, *zip(*exchanges))) else []


def is_exchange(user: Message, assistant: Message) -> bool:
    """Whether a turn is one text, and the next turn is one clip."""
    roles = user.role == "user" and assistant.role == "assistant" and assistant.recipient is None
    return roles and sole_text(user.content) is not None and isinstance(sole(assistant.content), AudioContent)


def sole(content: Any) -> Any:
    """The only part of a turn's content; of decoded JSON or of the official message."""
    return content[0] if isinstance(content, list) and len(content) == 1 else content


def sole_text(content: Any) -> str | None:
    """The text of a turn that has nothing else."""
    part = sole(content)
    if isinstance(part, dict):
        return part.get("text")
    return part.text if isinstance(part, TextContent) else part if isinstance(part, str) else None


class _Words(dict):
    """For `str.translate`: keeps letters, digits and their marks; anything else becomes a space."""

    def __missing__(self, code: int) -> int | str:
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else " "
        return self[code]


WORDS = _Words()


def words(text: str) -> str:
    """The words of a text: equal for two spellings of one sentence."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(WORDS).split())


def span_of(part: AudioPart) -> Span:
    source = str(part.path) if part.path is not None else (len(part.raw_audio), hashlib.sha256(part.raw_audio).hexdigest())
    start = part.offset_sec or 0.0
    return source, start, math.inf if part.duration_sec is None else start + part.duration_sec


class Contents:
    """The content of sources, equal for copies. Files are only read if another source has the same size."""

    def __init__(self, lines: Iterable[Line]):
        sources = {source for line in lines for source, _, _ in line.spans}
        self._sizes = {source: source[0] if isinstance(source, tuple) else os.stat(source).st_size for source in sources}
        self._count = Counter(self._sizes.values())
        self._known: dict[Source, str] = {}

    def __getitem__(self, source: Source) -> str:
        if source not in self._known:
            self._known[source] = self._digest(source)
        return self._known[source]

    def _digest(self, source: Source) -> str:
        if isinstance(source, tuple):
            return source[1]
        if self._count[self._sizes[source]] == 1:
            return f"size {self._sizes[source]}"
        with open(source, "rb") as file:
            return sha256_of(file).hex()


def overlapping(spans: Iterable[tuple[Span, T]], contents: Contents) -> Iterator[list[T]]:
    """Lists of the owners of spans that overlap, directly or through other spans."""
    owners: list[T] = []
    last, end = "", 0.0
    named = ((contents[source], start, stop, owner) for (source, start, stop), owner in spans)
    for content, start, stop, owner in sorted(named, key=itemgetter(0, 1)):
        if owners and (content != last or start > end - TOUCHING_SEC):
            yield owners
            owners = []
        last, end = content, max(stop, end if owners else 0.0)
        owners.append(owner)
    if owners:
        yield owners


def group_lines(lines: Sequence[Line]) -> None:
    """Set the group of each line. Lines share a group if they share audio, or speaker and text, also through others."""
    parents = list(range(len(lines)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    first: dict[Any, int] = {}
    for number, line in enumerate(lines):
        for text in filter(None, line.texts):
            parents[root(number)] = root(first.setdefault((line.speaker, text), number))
    spans = ((span, number) for number, line in enumerate(lines) for span in line.spans)
    for numbers in overlapping(spans, Contents(lines)):
        for number in numbers[1:]:
            parents[root(number)] = root(numbers[0])
    for number, line in enumerate(lines):
        line.group = root(number)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def find_speakers(lines: Sequence[Line], spec: str, seed: int) -> set[str]:
    """The speakers to hold out, named or chosen by the seed."""
    speakers = sorted({line.speaker for line in lines if line.speaker is not None})
    if spec.isdecimal():
        if int(spec) >= len(speakers):
            raise DataError(f"--hold_out_speakers {spec}: there are {len(speakers)} speakers; a name is written '{spec},'")
        return set(random.Random(f"speakers {seed}").sample(speakers, int(spec)))
    names = set(split_list(spec))
    unknown = sorted(names - set(speakers))
    if unknown:
        raise DataError(f"--hold_out_speakers: no line of {', '.join(unknown)}; speakers are {', '.join(speakers[:10])} ...")
    return names


def split_lines(lines: Sequence[Line], shares: dict[str, float], held_out: set[str], seed: int) -> None:
    """Set the split of every line. Groups stay together; all lines of a held-out speaker go to test.

    raises: DataError if nothing is left to train on
    """
    groups: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.group].append(line)
    free: dict[str | None, list[list[Line]]] = defaultdict(list)
    for members in groups.values():
        if any(line.speaker in held_out for line in members):
            assign(members, "test")
        else:
            free[members[0].speaker].append(members)
    rng = random.Random(f"splits {seed}")
    speakers = list(free)
    rng.shuffle(speakers)
    for of_speaker in free.values():
        rng.shuffle(of_speaker)
    for split, share in shares.items():
        wanted, before = round(share * len(lines)), math.inf
        while 0 < wanted < before:  # rounds over the speakers, until the split is full or nothing fits
            before = wanted
            for speaker in speakers:
                quota = max(2, math.ceil(share * len(free[speaker])))
                wanted -= take(free[speaker], split, quota, wanted)
    if not any(line.split == "train" for line in lines):
        raise DataError("nothing is left to train on: all records share audio, or a speaker's text, with held-out ones")


def take(groups: list[list[Line]], split: str, quota: int, wanted: int) -> int:
    """Move up to `quota` groups, of at most `wanted` lines together, into the split; returns how many lines moved."""
    taken, left = 0, []
    for members in groups:
        if quota > 0 and len(members) <= wanted - taken:
            assign(members, split)
            quota, taken = quota - 1, taken + len(members)
        else:
            left.append(members)
    groups[:] = left
    return taken


def assign(members: Iterable[Line], split: str) -> None:
    for line in members:
        line.split = split


def find_short(lines: Sequence[Line], shares: dict[str, float]) -> dict[str, str]:
    """The splits that got fewer lines than asked for, and why."""
    got = Counter(line.split for line in lines)
    largest = max(Counter(line.group for line in lines).values())
    return {
        split: f"{got[split]} of {round(share * len(lines))} records: all others share audio or text with too many more "
        f"(up to {largest} belong together)"
        for split, share in shares.items()
        if got[split] < round(share * len(lines))
    }


# ---------------------------------------------------------------------------------------------------------------------
# References


def write_splits(manifest: Manifest, lines: Sequence[Line], styles: dict[str, float], args: argparse.Namespace) -> dict:
    """Write each split; returns its number of records by kind."""
    pools = make_pools(lines)
    counts: dict[str, Counter] = {}
    for split in SPLITS:
        members = [line for line in lines if line.split == split]
        if members:
            counts[split] = Counter()
            records = make_records(manifest, members, pools, styles, args, counts[split])
            content = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_whole(
                args.output_dir / f"{split}.jsonl",
                lambda file, content=content: file.writelines(text.encode() for text in content),
            )
    return {split: dict(count) for split, count in counts.items()}


def make_pools(lines: Iterable[Line]) -> dict[tuple, list[list[Line]]]:
    """The possible references by split and speaker, in lists of the lines of one group, of which a record uses one."""
    pools: dict[tuple, dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line.is_plain and line.speaker is not None:
            pools[line.split, line.speaker][line.group].append(line)
    return {key: list(groups.values()) for key, groups in pools.items()}


def make_records(
    manifest: Manifest,
    lines: Sequence[Line],
    pools: dict[tuple, list[list[Line]]],
    styles: dict[str, float],
    args: argparse.Namespace,
    count: Counter,
) -> Iterator[dict]:
    """The ChatML records of a split; their paths start from the output folder."""
    for line in lines:
        rng = random.Random(f"{args.seed} {line.index}")
        if not line.is_plain:
            count["kept as they were"] += 1
            yield moved_value(manifest, line, args.output_dir)
            continue
        references = find_references(line, pools.get((line.split, line.speaker), []), args.ref_per_line, rng)
        for reference in references or [None]:
            record = moved_value(manifest, line, args.output_dir)
            system = own_system(record)
            voice = style = None
            if reference is None:
                kind = (
                    "without a speaker" if line.speaker is None else "no other line of the speaker that shares nothing with it"
                )
            elif rng.random() < args.ref_drop:
                kind = "reference dropped"
            else:
                (style,) = rng.choices(list(styles), list(styles.values())) if system is None else ["turn"]
                kind, voice = f"reference: {style}", moved_value(manifest, reference, args.output_dir)
            count[kind] += 1
            scene = prompts.QUIET_ROOM if system is None and rng.random() < args.scene_share else ""
            yield phrased(record, voice, style, system, scene)


def find_references(line: Line, pool: Sequence[Sequence[Line]], count: int, rng: random.Random) -> list[Line]:
    """Up to `count` lines of the pool, each of another group, none of the line's own."""
    groups = rng.sample(pool, min(count + 1, len(pool)))
    return [rng.choice(group) for group in groups if group[0].group != line.group][:count]


def own_system(record: dict) -> Any:
    """The content of a system turn that is not the official default; None if there is none."""
    first = record["messages"][0]
    is_own = first["role"] == "system" and first["content"] not in prompts.DEFAULT_SYSTEMS
    return first["content"] if is_own else None


def phrased(record: dict, reference: dict | None, style: str | None, system: Any, scene: str) -> dict:
    """A plain line as the official inference would ask for it, after a reference (another plain line) or without one."""
    *_, user, assistant = record["messages"]
    voices = []
    if reference:
        *_, ref_user, ref_assistant = reference["messages"]
        clip = {name: value for name, value in sole(ref_assistant["content"]).items() if name != "audio_label_url"}
        transcript = reference.get("misc", {}).get("text") or sole_text(ref_user["content"])  # references are not normalised
        voices = [Voice(clip, transcript if style == "turn" else None)]
    text, clip = sole_text(user["content"]), sole(assistant["content"])
    made = prompts.record(text, clip, voices, scene, system, record.get("speaker"))
    return made | {name: record[name] for name in ("misc",) if name in record}


def moved_value(manifest: Manifest, line: Line, folder: Path) -> dict:
    _, value = manifest.value(line.index)
    move_paths(value, manifest.folder, folder)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


def find_leaks(folder: Path) -> dict:
    """What the written splits share, computed from the files."""
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    splits = {split: list(read_lines(open_manifest(path)[0])) for split, path in paths.items() if path.exists()}
    lines = [line for members in splits.values() for line in members]
    contents = Contents(lines)
    clips: Counter[tuple[str, str]] = Counter()
    spans = {(span, split) for split, members in splits.items() for line in members for span in line.spans}
    for owners in overlapping(spans, contents):
        clips.update(combinations([split for split in SPLITS if split in owners], 2))
    texts = {split: {(line.speaker, text) for line in members for text in line.texts} for split, members in splits.items()}
    speakers = {split: {line.speaker for line in members} - {None} for split, members in splits.items()}
    shared = {
        f"{a} and {b}": {
            "stretches of audio": clips[a, b],
            "lines of one speaker": sum(bool(text) for _, text in texts[a] & texts[b]),
            "texts of any speaker": len({text for _, text in texts[a]} & {text for _, text in texts[b]} - {""}),
            "speakers": len(speakers[a] & speakers[b]),
        }
        for a, b in combinations(splits, 2)
    }
    own = sum(refers_to_target(line, contents) for line in lines)
    leaks = own + sum(pair["stretches of audio"] + pair["lines of one speaker"] for pair in shared.values())
    return {"shared": shared, "records whose reference is their own target": own, "leaks": leaks}


def refers_to_target(line: Line, contents: Contents) -> bool:
    """Whether audio that trains is also in the context."""
    spans = [*((span, "context") for span in line.context), *((span, "target") for span in line.targets)]
    return any(len(set(owners)) > 1 for owners in overlapping(spans, contents))


def show_report(report: dict, folder: Path) -> None:
    for split, count in report["written"].items():
        print(f"{folder / split}.jsonl: {sum(count.values())} records")
        for kind, number in sorted(count.items()):
            print(f"  {number:8} {kind}")
    for split, reason in report["not filled"].items():
        print(f"{split} got only {reason}")
    for pair, shared in report["shared"].items():
        print(f"{pair} share: " + ", ".join(f"{number} {what}" for what, number in shared.items()))
    print("no leaks" if not report["leaks"] else f"{report['leaks']} LEAKS: see leakage.json")
