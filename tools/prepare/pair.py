"""References for zero-shot cloning, and train / val / test without leaks.

    python -m tools.prepare pair lines.jsonl paired/ --val_share 0.02 --test_share 0.02

Each plain line (a text and its audio, with `speaker` set) gets another utterance of the same speaker as its reference, phrased
as the official inference phrases it: as an earlier exchange (`turn`) or in the system turn (`system`). Records of any other
shape are kept as they are.

Records that share a clip (by content) or a speaker's text go into one split together, and a reference comes from the split of
its line, so that nothing heard in training is met again in val or test. Held-out lines are taken a few at a time from one
speaker after the other, so that they have references too. The same seed gives the same files.

Writes train.jsonl, val.jsonl and test.jsonl (those that are not empty) and leakage.json into the output folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from checkpoint import write_whole
from forms import make_record, open_manifest
from manifest import AudioPart, DataError, Manifest, check
from tools.prepare.convert import move_paths

SPLITS = ("train", "val", "test")
STYLES = ("turn", "system")


@dataclass
class Line:
    """What pairing has to know of a record."""

    index: int  # in the manifest
    speaker: str | None
    text: str  # normalised; "" unless the record is plain
    clips: list[str]  # identities of all its clips
    is_plain: bool  # one user text, one assistant clip: can be a line with a reference, and a reference
    group: int = -1  # records that have to stay together
    split: str = "train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="a dataset in one of the forms of forms.py")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ref_per_line", type=int, default=1, help="records made of each line, each with another reference")
    parser.add_argument("--ref_drop", type=float, default=0.1, help="share of records that get no reference")
    parser.add_argument("--styles", default="turn=0.7,system=0.3", help="mixture of phrasings")
    parser.add_argument("--val_share", type=float, default=0.02, help="share of the records for val.jsonl")
    parser.add_argument("--test_share", type=float, default=0.0, help="share of the records for test.jsonl")
    parser.add_argument(
        "--hold_out_speakers", default="", help="speakers that are in test.jsonl alone: a number, or names a,b,c"
    )


def run(args: argparse.Namespace) -> int:
    styles = parse_styles(args.styles)
    if args.ref_per_line < 1 or not 0 <= args.ref_drop <= 1 or min(args.val_share, args.test_share) < 0:
        raise DataError("--ref_per_line is 1 or more, --ref_drop between 0 and 1, shares are not negative")
    if args.val_share + args.test_share >= 1:
        raise DataError("--val_share and --test_share leave nothing to train on")
    manifest, _ = check(open_manifest(args.input)[0])
    lines = list(read_lines(manifest))
    group_lines(lines)
    split_lines(lines, args.val_share, args.test_share, find_speakers(lines, args.hold_out_speakers, args.seed), args.seed)
    counts = write_splits(manifest, lines, styles, args)
    report = {"written": counts, **find_leaks(args.output_dir)}
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


# ---------------------------------------------------------------------------------------------------------------------
# What is the same


def read_lines(manifest: Manifest) -> Iterator[Line]:
    identify = Identities(part for record in manifest for part in record.audio)
    for index, record in enumerate(manifest):
        turns = record.chatml.messages
        is_plain = (
            [turn.role for turn in turns] == ["user", "assistant"] and len(record.audio) == 1 and record.audio[0].is_output
        )
        said = sole_text(turns[0].content)
        is_plain = is_plain and said is not None and sole_text(turns[1].content) is None and not several(turns[1].content)
        clips = [identify(part) for part in record.audio]
        yield Line(index, record.chatml.speaker, normalise(said) if is_plain else "", clips, is_plain)


def several(content: Any) -> bool:
    return isinstance(content, list) and len(content) != 1


def sole_text(content: Any) -> str | None:
    """The text of a turn that is one text and nothing else; of decoded JSON or of the official message."""
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if isinstance(content, dict):
        return content.get("text") if content.get("type") == "text" else None
    return getattr(content, "text", content if isinstance(content, str) else None)


def normalise(text: str) -> str:
    """The words alone: the same for two spellings of one sentence."""
    return " ".join(re.findall(r"\w+", text.casefold()))


class Identities:
    """What a clip is, by content: files are only read where another one has the same size."""

    def __init__(self, parts: Iterable[AudioPart]):
        paths = {part.path for part in parts if part.path is not None}
        self._sizes = {path: path.stat().st_size for path in paths}
        self._count = Counter(self._sizes.values())
        self._known: dict[Path, str] = {}

    def __call__(self, part: AudioPart) -> str:
        if part.path is None:
            content = hashlib.sha256(part.raw_audio).hexdigest()
        else:
            if part.path not in self._known:
                self._known[part.path] = self._content(part.path)
            content = self._known[part.path]
        return f"{content} {part.offset_sec or 0} {part.duration_sec or ''}"

    def _content(self, path: Path) -> str:
        size = self._sizes[path]
        if self._count[size] == 1:
            return f"size {size}"
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def group_lines(lines: Sequence[Line]) -> None:
    """Number the groups: lines that share a clip, or a speaker and a text, directly or through others."""
    parents = list(range(len(lines)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[Any, int] = {}
    for number, line in enumerate(lines):
        keys = [*line.clips, *([(line.speaker, line.text)] if line.text else [])]
        for key in keys:
            parents[root(number)] = root(first.setdefault(key, number))
    for number, line in enumerate(lines):
        line.group = root(number)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def find_speakers(lines: Sequence[Line], spec: str, seed: int) -> set[str]:
    """The speakers to hold out: names, or so many of them chosen by the seed."""
    speakers = sorted({line.speaker for line in lines if line.speaker is not None})
    if spec.isdecimal():
        if int(spec) >= len(speakers):
            raise DataError(f"--hold_out_speakers {spec}: there are {len(speakers)} speakers")
        return set(random.Random(f"speakers {seed}").sample(speakers, int(spec)))
    names = {name.strip() for name in spec.split(",") if name.strip()}
    unknown = sorted(names - set(speakers))
    if unknown:
        raise DataError(f"--hold_out_speakers: no line of {', '.join(unknown)}; speakers are {', '.join(speakers[:10])} ...")
    return names


def split_lines(lines: Sequence[Line], val_share: float, test_share: float, held_out: set[str], seed: int) -> None:
    """Set the split of every line; groups stay together, and a speaker who is held out is so with every line."""
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
    for members in free.values():
        rng.shuffle(members)
    for split, share in (("test", test_share), ("val", val_share)):
        wanted = round(share * len(lines))
        for speaker in speakers * 2:  # a second round where one was not enough
            quota = max(2, math.ceil(share * sum(map(len, free[speaker]))))
            while quota > 0 and wanted > 0 and free[speaker]:
                members = free[speaker].pop()
                assign(members, split)
                quota -= len(members)
                wanted -= len(members)


def assign(members: Iterable[Line], split: str) -> None:
    for line in members:
        line.split = split


# ---------------------------------------------------------------------------------------------------------------------
# References


def write_splits(manifest: Manifest, lines: Sequence[Line], styles: dict[str, float], args: argparse.Namespace) -> dict:
    """Write each split; returns how many records of which kind it got."""
    pools: dict[tuple, list[Line]] = defaultdict(list)
    for line in lines:
        if line.is_plain and line.speaker is not None:
            pools[line.split, line.speaker].append(line)
    counts: dict[str, Counter] = {}
    for split in SPLITS:
        path = args.output_dir / f"{split}.jsonl"
        members = [line for line in lines if line.split == split]
        path.unlink(missing_ok=True)
        if members:
            counts[split] = Counter()
            records = make_records(manifest, members, pools, styles, args, counts[split])
            content = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_whole(path, lambda file, content=content: file.writelines(text.encode() for text in content))
    return {split: dict(count) for split, count in counts.items()}


def make_records(
    manifest: Manifest,
    lines: Sequence[Line],
    pools: dict[tuple, list[Line]],
    styles: dict[str, float],
    args: argparse.Namespace,
    count: Counter,
) -> Iterator[dict]:
    """The ChatML records of a split, with paths that start from the output folder."""
    for line in lines:
        rng = random.Random(f"{args.seed} {line.index}")
        if not line.is_plain:
            count["kept as they were"] += 1
            yield moved_value(manifest, line, args.output_dir)
            continue
        references = find_references(line, pools[line.split, line.speaker] if line.speaker else [], args.ref_per_line, rng)
        for reference in references or [None]:
            record = moved_value(manifest, line, args.output_dir)
            if reference is None:
                count["without a speaker" if line.speaker is None else "no other line of the speaker"] += 1
            elif rng.random() < args.ref_drop:
                count["reference dropped"] += 1
            else:
                (style,) = rng.choices(list(styles), list(styles.values()))
                count[f"reference: {style}"] += 1
                record = with_reference(record, moved_value(manifest, reference, args.output_dir), style)
            yield record


def find_references(line: Line, pool: Sequence[Line], count: int, rng: random.Random) -> list[Line]:
    """Up to `count` different lines of the pool that are of another group."""
    found: dict[int, Line] = {}
    for candidate in pool if len(pool) <= 2 * count + 8 else rng.sample(pool, 2 * count + 8):
        if candidate.group != line.group:
            found.setdefault(candidate.group, candidate)
    if len(found) < count and len(pool) > 2 * count + 8:  # a pool of a few large groups
        for candidate in rng.sample(pool, len(pool)):
            if candidate.group != line.group and len(found) < count:
                found.setdefault(candidate.group, candidate)
    return rng.sample(list(found.values()), min(count, len(found)))


def with_reference(record: dict, reference: dict, style: str) -> dict:
    (text, clip), (words, voice) = (
        (sole_text(said["content"]), audio["content"][0] if isinstance(audio["content"], list) else audio["content"])
        for said, audio in (value["messages"] for value in (record, reference))
    )
    made = make_record(text, clip, record.get("speaker"), [(words if style == "turn" else None, voice)])
    return made | {name: record[name] for name in ("misc",) if name in record}


def moved_value(manifest: Manifest, line: Line, folder: Path) -> dict:
    _, value = manifest.value(line.index)
    move_paths(value, manifest.folder, folder)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


def find_leaks(folder: Path) -> dict:
    """What the splits on the disk share, found in the files themselves."""
    splits = {split: open_manifest(folder / f"{split}.jsonl")[0] for split in SPLITS if (folder / f"{split}.jsonl").exists()}
    identify = Identities(part for manifest in splits.values() for record in manifest for part in record.audio)
    clips, said, speakers = ({split: set() for split in splits} for _ in range(3))
    own_reference = 0
    for split, manifest in splits.items():
        for record in manifest:
            heard = [identify(part) for part in record.audio]
            own_reference += len(heard) != len(set(heard))
            clips[split].update(heard)
            speakers[split].add(record.chatml.speaker)
            texts = [sole_text(turn.content) for turn in record.chatml.messages if turn.role == "user"]
            said[split].update((record.chatml.speaker, normalise(text)) for text in texts if text is not None)
    shared = {}
    for a, b in combinations(splits, 2):
        texts = {text for _, text in said[a]} & {text for _, text in said[b]}
        shared[f"{a} and {b}"] = {
            "clips": len(clips[a] & clips[b]),
            "lines of one speaker": len({pair for pair in said[a] & said[b] if pair[0] is not None}),
            "texts, whoever says them": len(texts),
            "speakers": len((speakers[a] & speakers[b]) - {None}),
        }
    leaks = own_reference + sum(pair["clips"] + pair["lines of one speaker"] for pair in shared.values())
    return {"shared": shared, "records that hear their own target": own_reference, "leaks": leaks}


def show_report(report: dict, folder: Path) -> None:
    for split, count in report["written"].items():
        print(f"{folder / split}.jsonl: {sum(count.values())} records")
        for kind, number in sorted(count.items()):
            print(f"  {number:8} {kind}")
    for pair, shared in report["shared"].items():
        print(f"{pair} share: " + ", ".join(f"{number} {what}" for what, number in shared.items()))
    print("no leaks" if not report["leaks"] else f"{report['leaks']} LEAKS: see leakage.json")
