"""References for zero-shot cloning, and train / val / test without leaks.

    bash launch.sh prepare pair lines.jsonl paired --val_share 0.02 --test_share 0.02

A plain line (a text, its audio and a `speaker`) gets another line of the same speaker as its reference: as an earlier
exchange (`turn`) or in the system turn (`system`), as the official inference does; a share of all lines gets the official
scene. A line with a system turn of its own keeps it, and its reference is an earlier exchange. All other records stay as
they are.

--dialogues joins a share of the lines: those that follow each other in one recording (in a call with a channel for each
speaker too; its channels become files in OUTPUT_DIR/audio), or lines of --dialogue_speakers. The
text has a `[SPEAKERn]` turn for each, every speaker gets a reference, and `misc.speaker_changes_sec` tells evaluation where
another one begins.

Records that share audio (the same content, overlapping parts of a file) or a speaker's text go into one split, and a
reference comes from the split of its line. So val and test hold nothing that training has seen. Held-out lines are taken a
few at a time from each speaker, so that they have references too; val has at least four with a reference, or a tenth of
the lines where that is less. The same seed gives the same files.

Writes train.jsonl, val.jsonl and test.jsonl (unless empty), and leakage.json, which is computed from these files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from common import DataError, split_list, write_lines, write_text
from prepare import dialogues, prompts
from prepare.convert import move_paths
from prepare.forms import open_manifest
from prepare.manifest import FEW, Manifest, check, share_held_out
from prepare.overlap import Contents, Line, group_lines, overlapping, read_lines, sole, sole_text
from prepare.prompts import Phrasing, Voice
from prepare.rows import Reading

SPLITS = ("train", "val", "test")
STYLES = ("turn", "system")


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
    parser.add_argument(
        "--dialogues", type=float, default=0.0, metavar="SHARE", help="share of the lines joined into dialogues"
    )
    parser.add_argument(
        "--dialogue_speakers", default="", help="join lines of these, a,b,c; default: lines that follow each other in one file"
    )
    parser.add_argument("--val_share", type=float, default=0.02, help="share of the input's records for val.jsonl; 0: none")
    parser.add_argument("--test_share", type=float, default=0.0, help="share of the input's records for test.jsonl")
    parser.add_argument(
        "--hold_out_speakers",
        default="",
        help="speakers that are only in test.jsonl: how many, or their names a,b,c (a name that is a number: 1034,)",
    )


def run(args: argparse.Namespace) -> int:
    styles = parse_styles(args.styles)
    if args.ref_per_line < 1 or not all(0 <= share <= 1 for share in (args.ref_drop, args.scene_share, args.dialogues)):
        raise DataError("--ref_per_line is 1 or more, --ref_drop between 0 and 1, --scene_share and --dialogues too")
    if not (min(args.val_share, args.test_share) >= 0 and args.val_share + args.test_share < 1):
        raise DataError("--val_share and --test_share leave nothing to train on, or are negative")
    refuse_used(args.output_dir)
    reading = Reading(phrasing=None, unpack_to=args.output_dir / "audio")
    manifest, _ = check(open_manifest(args.input, reading=reading)[0])
    lines = list(read_lines(manifest))
    group_lines(lines)
    shares = {"test": args.test_share, "val": args.val_share}
    split_lines(lines, shares, find_speakers(lines, args.hold_out_speakers, args.seed), args.seed)
    pairing = Pairing(manifest, styles, args, make_pools(lines))
    pairing.dialogues = find_dialogues(pairing, lines)
    counts = write_splits(pairing, lines)
    report = {"written": counts, "not filled": find_short(lines, shares), **find_leaks(args.output_dir)}
    write_text(args.output_dir / "leakage.json", json.dumps(report, indent=2) + "\n")
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
    found = [
        name for name in (*(f"{split}.jsonl" for split in SPLITS), "leakage.json", "dialogues") if (folder / name).exists()
    ]
    if found:
        raise DataError(f"{folder}: holds {', '.join(found)} already; choose another folder, or delete what is there")


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
        if split == "val" and share and len(lines) >= 20:  # a tenth of fewer is one line, without another as its reference
            share = share_held_out(share, len(lines))
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


@dataclass
class Pairing:
    """What the records are made from."""

    manifest: Manifest
    styles: dict[str, float]
    args: argparse.Namespace
    pools: dict[tuple, list[list[Line]]]  # see `make_pools`
    dialogues: dict[int, Dialogue] = field(default_factory=dict)  # by the index of each of their lines

    def value(self, line: Line) -> dict:
        """The line's record, whose paths start from the output folder."""
        _, value = self.manifest.value(line.index)
        move_paths(value, self.manifest.folder, self.args.output_dir)
        return value

    def style(self, rng: random.Random) -> str:
        return rng.choices(list(self.styles), list(self.styles.values()))[0]

    def scene(self, rng: random.Random) -> str:
        return prompts.QUIET_ROOM if rng.random() < self.args.scene_share else ""


@dataclass
class Dialogue:
    lines: list[Line]
    references: list[Line]  # of SPEAKER0, SPEAKER1, ...


def write_splits(pairing: Pairing, lines: Sequence[Line]) -> dict:
    """Write each split; returns its number of records by kind."""
    counts: dict[str, Counter] = {}
    for split in SPLITS:
        members = [line for line in lines if line.split == split]
        if members:
            counts[split] = Counter()
            write_lines(pairing.args.output_dir / f"{split}.jsonl", make_records(pairing, members, counts[split]))
    return {split: dict(count) for split, count in counts.items()}


def make_pools(lines: Iterable[Line]) -> dict[tuple, list[list[Line]]]:
    """The possible references by split and speaker, in lists of the lines of one group, of which a record uses one."""
    pools: dict[tuple, dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line.is_plain and line.speaker is not None:
            pools[line.split, line.speaker][line.group].append(line)
    return {key: list(groups.values()) for key, groups in pools.items()}


def make_records(pairing: Pairing, lines: Sequence[Line], count: Counter) -> Iterator[dict]:
    """The ChatML records of a split; their paths start from the output folder."""
    args = pairing.args
    for line in lines:
        rng = random.Random(f"{args.seed} {line.index}")
        if not line.is_plain:
            count["kept as they were"] += 1
            yield pairing.value(line)
            continue
        if dialogue := pairing.dialogues.get(line.index):
            if dialogue.lines[0] is line:
                count[f"dialogues of {len(dialogue.references)} speakers"] += 1
                yield make_dialogue(pairing, dialogue, rng)
            continue
        references = find_references([line], pairing.pools.get((line.split, line.speaker), []), args.ref_per_line, rng)
        for reference in references or [None]:
            record = pairing.value(line)
            system = own_system(record)
            voices: list[Voice] = []
            if reference is None:
                kind = (
                    "without a speaker" if line.speaker is None else "no other line of the speaker that shares nothing with it"
                )
            elif rng.random() < args.ref_drop and not (line.split == "val" and num_referring(count) < FEW):
                kind = "reference dropped"
            else:
                style = pairing.style(rng) if system is None else "turn"
                kind, voices = f"reference: {style}", [voice_of(pairing.value(reference), style)]
            count[kind] += 1
            yield phrased(record, voices, system, pairing.scene(rng) if system is None else "")


def num_referring(count: Counter) -> int:
    return sum(number for kind, number in count.items() if kind.startswith("reference: "))


def find_references(lines: Sequence[Line], pool: Sequence[Sequence[Line]], count: int, rng: random.Random) -> list[Line]:
    """Up to `count` lines of the pool, each of another group, none of a group of `lines`."""
    own = {line.group for line in lines}
    groups = rng.sample(pool, min(count + len(own), len(pool)))
    return [rng.choice(group) for group in groups if group[0].group not in own][:count]


def find_dialogues(pairing: Pairing, lines: Sequence[Line]) -> dict[int, Dialogue]:
    """Dialogues whose speakers all have a reference, by the index of each line, until --dialogues of each split are joined."""
    share, speakers = pairing.args.dialogues, split_list(pairing.args.dialogue_speakers)
    unknown = sorted(set(speakers) - {line.speaker for line in lines})
    if unknown or len(speakers) == 1 or (speakers and not share):
        problem = f"no line of {', '.join(unknown)}" if unknown else "name two or more, and a share with --dialogues"
        raise DataError(f"--dialogue_speakers {pairing.args.dialogue_speakers}: {problem}")
    rng, found = random.Random(f"dialogues {pairing.args.seed}"), {}
    wanted = Counter({split: share * count for split, count in Counter(line.split for line in lines if line.is_plain).items()})
    for members in dialogues.candidates(lines, speakers, rng) if share else ():
        split, names = members[0].split, dialogues.speakers_of(members)
        references = [find_references(members, pairing.pools[split, name], 1, rng) for name in names]
        is_own = any(own_system(pairing.value(line)) is not None for line in members)  # a system turn that would be lost
        if wanted[split] >= len(members) and all(references) and not is_own:
            wanted[split] -= len(members)
            found |= dict.fromkeys((line.index for line in members), Dialogue(members, [line for (line,) in references]))
    if share and not found:
        raise DataError(
            "--dialogues: nothing to join. Lines need speakers, and times in one recording (or --dialogue_speakers), and each "
            "speaker a further line as reference"
        )
    return found


def make_dialogue(pairing: Pairing, dialogue: Dialogue, rng: random.Random) -> dict:
    """The ChatML record of a dialogue; a clip that it does not share with a recording is written to dialogues/."""
    lines, records = dialogue.lines, [pairing.value(line) for line in dialogue.lines]
    texts = [sole_text(record["messages"][-2]["content"]) for record in records]
    if shared := dialogues.shared_clip(lines):
        clip, begins = sole(records[0]["messages"][-1]["content"]) | shared[0], shared[1]
    else:
        members = [pairing.manifest[line.index] for line in lines]
        clips = dialogues.lasting([record.audio[0] for record in members], lines)
        parts = [(clip, record.source) for clip, record in zip(clips, members)]
        folder = pairing.args.output_dir / "dialogues"
        path, begins = dialogues.write_joined(parts, folder / f"{lines[0].index:06d}")
        clip = {"type": "audio", "audio_url": f"{folder.name}/{path.name}"}
    style, scene = pairing.style(rng), pairing.scene(rng)
    voices = [voice_of(pairing.value(line), style) for line in dialogue.references]
    made = prompts.record(dialogues.script(lines, texts), clip, voices, scene, speaker=records[0].get("speaker"))
    return made | {"misc": {"speaker_changes_sec": dialogues.changes(lines, begins)}}


def own_system(record: dict) -> Any:
    """The content of a system turn that is not the official default; None if there is none."""
    first = record["messages"][0]
    is_own = first["role"] == "system" and first["content"] not in prompts.DEFAULT_SYSTEMS
    return first["content"] if is_own else None


def voice_of(reference: dict, style: str) -> Voice:
    """A plain line as the reference of its speaker: its transcript belongs to an earlier exchange alone ("turn")."""
    *_, user, assistant = reference["messages"]
    clip = {name: value for name, value in sole(assistant["content"]).items() if name != "audio_label_url"}
    transcript = reference.get("misc", {}).get("text") or sole_text(user["content"])  # references are not normalised
    return Voice(clip, transcript if style == "turn" else None)


def phrased(record: dict, voices: Sequence[Voice], system: Any, scene: str) -> dict:
    """A plain line as the official inference would ask for it, after a reference or without one."""
    *_, user, assistant = record["messages"]
    text, clip = sole_text(user["content"]), sole(assistant["content"])
    made = prompts.record(text, clip, voices, scene, system, record.get("speaker"))
    return made | {name: record[name] for name in ("misc",) if name in record}


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
