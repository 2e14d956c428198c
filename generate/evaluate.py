"""Judge a model by what it says, alone or beside another: transcripts against texts, voices against references.

    bash launch.sh evaluate --ckpt runs/voice/final --against runs/base --lines test.jsonl --out runs/voice/evaluation
    bash launch.sh evaluate --ckpt runs/voice/final --lines seedtts/en/meta.lst --sv_model wavlm_large_finetune.pth --out eval

Generates every line as `bash launch.sh generate --lines` does, whose flags for sampling, codec and speed it takes, on every GPU;
--ckpt and --against may also be folders that it wrote earlier. --lines takes Seed-TTS-eval's meta.lst too, whose recordings of
the texts are not used. Writes OUT/evaluation.json and evaluation.html, with both takes of every line, worst first.

    wer_seedtts    mean of the lines' word error rates, by Seed-TTS-eval's normalisation: the figure of published tables, which
                   take whisper-large-v3 for English and paraformer-zh for Mandarin (characters; here Whisper as well)
    wer_pooled     word errors of all lines / words of all lines
    cer            the same with characters
    sim_o, sim_r   cosine of speaker embeddings: clip against the reference as it is, and as the codec gives it back; of lines
                   with one reference. Published tables take WavLM-large with an ECAPA-TDNN head, wavlm_large_finetune.pth
    stop_rate      share of the lines that end by themselves, and not before they began
    duration_ratio, code_match   length, and codes that agree, against the record's own answer, where there is one
    runaway_rate   share of the lines that got stuck in a loop or in silence
    rtf            seconds of generation / seconds of speech

A line for which nothing was generated has every word wrong and similarity 0. With --against, differences have 95 % intervals:
lines are drawn again 2,000 times, the same for both models.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from common import ConfigError, DataError, json_safe, write_lines, write_text
from distributed import Dist, log_list, setup_distributed
from generate import __main__ as generate
from generate.files import RESULTS_FILE, decode, read_results
from generate.judges import SpeakerSimilarity, Transcriber
from generate.lines import Chunking, Line, read_lines
from generate.page import render, short_names
from generate.scores import find_runaway
from generate.seedtts import Errors, read_meta
from prepare.audio import CodecInfo, codec_folder, load_codec, read_codes, read_waveform
from prepare.manifest import AudioPart, Record
from prepare.prompts import TAG
from process.command import leave, parser_of, says_errors

LANGUAGES = {"en": "english", "zh": "chinese"}
NUM_DRAWS = 2000
ASR_MODEL, SV_MODEL = "openai/whisper-large-v3", "microsoft/wavlm-base-plus-sv"

# ---------------------------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class Measure:
    """A figure of all lines: the sum of what each take counts over the sum of what it counts that out of."""

    name: str
    counted: str  # key of a take
    out_of: str = ""  # key of a take; "": 1 for each take that has `counted`
    better: int = 0  # 1: more is better, -1: less, 0: neither
    is_share: bool = True  # shown in percent

    def sums(self, takes: Sequence[dict]) -> np.ndarray:
        """[2, takes]: numerators and denominators; 0 and 0 for a take without this figure."""
        found = [self.counted in take and (not self.out_of or self.out_of in take) for take in takes]
        pairs = [(take[self.counted], take[self.out_of] if self.out_of else 1) if f else (0, 0) for take, f in zip(takes, found)]
        return np.array(pairs, float).T

    def show(self, value: float | None, sign: str = "") -> str:
        if value is None:
            return "-"
        return f"{value:{sign}.2%}".replace("%", " %") if self.is_share else f"{value:{sign}.3f}"


MEASURES = (
    Measure("wer_seedtts", "wer", better=-1),
    Measure("wer_pooled", "word_errors", "words", better=-1),
    Measure("cer", "char_errors", "chars", better=-1),
    Measure("sim_o", "sim_o", better=1, is_share=False),
    Measure("sim_r", "sim_r", better=1, is_share=False),
    Measure("stop_rate", "stopped", better=1),
    Measure("duration_ratio", "frames", "target_frames"),
    Measure("code_match", "matching", "compared", better=1),
    Measure("runaway_rate", "is_runaway", better=-1),
    Measure("rtf", "", is_share=False, better=-1),
)
SHORT = {"wer": "wer_seedtts", "sim": "sim_o"}


@dataclass
class Figure:
    """Of one model, and of the other with the difference (first minus other) and its 95 % interval."""

    value: float | None
    against: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None


def compare(takes: Sequence[Sequence[dict]], rtf: Sequence[float | None], seed: int = 0) -> dict[str, Figure]:
    """The figures, by name, that one model's takes have, or two models' takes of the same lines."""
    n = len(takes[0])
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=NUM_DRAWS) if len(takes) > 1 else None
    figures = {}
    for measure in MEASURES[:-1]:
        sums = [measure.sums(each) for each in takes]
        if any(each[1].sum() == 0 for each in sums):
            continue
        values = [each[0].sum() / each[1].sum() for each in sums]
        figures[measure.name] = Figure(*values)
        if draws is not None:
            with np.errstate(invalid="ignore", divide="ignore"):  # a draw may have no line with this figure
                drawn = [(draws @ each[0]) / (draws @ each[1]) for each in sums]
            low, high = np.nanpercentile(drawn[0] - drawn[1], (2.5, 97.5))
            figures[measure.name] = Figure(*values, values[0] - values[1], float(low), float(high))
    if any(rtf):
        figures["rtf"] = Figure(*rtf)
    return figures


def table(figures: dict[str, Figure], titles: Sequence[str]) -> list[list[str]]:
    """Rows of text, the first of them a header."""
    header = ["", *titles] + (["difference", "95 % interval", ""] if len(titles) > 1 else [])
    rows = [header]
    for measure in MEASURES:
        if figure := figures.get(measure.name):
            row = [measure.name, *(measure.show(value) for value in (figure.value, figure.against)[: len(titles)])]
            if figure.low is not None:
                is_clear = measure.better and (figure.low > 0 or figure.high < 0)
                verdict = ("better" if figure.difference * measure.better > 0 else "worse") if is_clear else ""
                interval = f"{measure.show(figure.low, '+')} to {measure.show(figure.high, '+')}"
                row += [measure.show(figure.difference, "+"), interval, verdict]
            rows.append(row + [""] * (len(header) - len(row)))
    return rows


def render_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)


def find_worse(figures: dict[str, Figure], limits: dict[str, float]) -> list[str]:
    """The figures that are worse than the other model's by more than their limits."""
    found = []
    for measure in MEASURES:
        if measure.name not in limits:
            continue
        figure = figures.get(measure.name)
        if figure is None or figure.against is None:
            raise ConfigError(f"--fail_if_worse {measure.name}: was not measured for both models")
        loss = (figure.against - figure.value) * measure.better
        if loss > limits[measure.name] * (0.01 if measure.is_share else 1):
            found.append(f"{measure.name} {measure.show(figure.value)} against {measure.show(figure.against)}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Takes


@dataclass
class Judges:
    """What takes are judged with. codec, info: None where voices are not compared"""

    language: str
    codec: Any = None
    info: CodecInfo | None = None
    transcriber: Transcriber | None = None
    similarity: SpeakerSimilarity | None = None
    _references: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def load(cls, args: argparse.Namespace, codec: str, device: torch.device) -> Judges:
        if not codec:
            return cls(args.language)
        transcriber = Transcriber(args.asr_model, device, LANGUAGES[args.language]) if args.asr_model != "none" else None
        similarity = SpeakerSimilarity(args.sv_model, device) if args.sv_model != "none" else None
        loaded = load_codec(codec, device) if similarity else None
        return cls(args.language, loaded, CodecInfo.of_folder(codec_folder(codec)) if similarity else None, transcriber, similarity)

    def take(self, line: Line, text: str, result: dict, folder: Path, target_frames: int | None) -> dict:
        """What there is to say of one line's result in `folder`, {} if it has none."""
        path = folder / result.get("codes", "-")
        codes = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64)) if path.is_file() else torch.zeros((1, 0))
        wav = folder / result["wav"] if "wav" in result and (folder / result["wav"]).is_file() else None
        runaway = find_runaway(codes)
        take = {"name": line.name, "text": text, "frames": codes.shape[1]}
        take["stopped"] = bool(result.get("stopped")) and codes.shape[1] > 0
        take |= {"runaway": runaway, "is_runaway": runaway is not None}
        if target_frames:
            compared, match = max(codes.shape[1], target_frames), result.get("code_match", 0.0)
            take |= {"target_frames": target_frames, "compared": compared, "matching": match * compared, "code_match": match}
        take |= {"codes": str(path)} if path.is_file() else {}
        take |= {"wav": str(wav)} if wav else {}
        samples, rate = soundfile.read(wav, dtype="float32") if wav else (None, 0)
        if self.transcriber:
            take["transcript"] = self.transcriber(samples, rate).strip() if wav else ""
            errors = Errors.of(take["transcript"], text, self.language)
            take |= asdict(errors) | {"wer": errors.word_errors / errors.words}
        if self.similarity and (part := reference_of(line)):
            embedding = self.similarity.embed(samples, rate) if wav else None
            for name, reference in self.embed_reference(part, line.source).items():
                take[name] = self.similarity.compare(embedding, reference) if wav else 0.0
        return take

    def embed_reference(self, part: AudioPart, source: str) -> dict[str, Tensor]:
        """Embeddings of a reference clip: as it is, and as the codec gives it back."""
        key = part.path, part.offset_sec, part.duration_sec, part.raw_audio
        if key not in self._references:
            found = {}
            if part.holds_codes:
                codes = read_codes(part.path, self.info.num_codebooks, self.info.codebook_size, source)
            else:
                clip = read_waveform(part, source)
                found["sim_o"] = self.similarity.embed(*clip)
                with torch.no_grad():
                    codes = self.codec.encode(*clip).cpu()
            found["sim_r"] = self.similarity.embed(decode(self.codec, codes), self.info.sample_rate_hz)
            self._references[key] = found
        return self._references[key]


def reference_of(line: Line) -> AudioPart | None:
    """The reference clip of a line that has exactly one."""
    clips = line.record([], line.chunks[0]).audio
    return clips[0] if len(clips) == 1 else None


def speak(options: argparse.Namespace, dist: Dist) -> tuple[Path, list[dict], float | None]:
    """(folder, results, real-time factor) of a model, or of a folder of results. Collective."""
    if (Path(options.ckpt) / RESULTS_FILE).is_file():
        return Path(options.ckpt), dist.together(lambda: read_results(Path(options.ckpt))), None
    lines = dist.together(lambda: generate.lines_of(options))
    records = dist.together(lambda: [line.record([], line.chunks[0]) for line in lines])
    with tempfile.TemporaryDirectory() as scratch:
        engine = generate.load_engine(options, dist, [*records, *(Record(None, line.target, line.source) for line in lines)], Path(scratch))
        started = time.perf_counter()
        results, _ = generate.generate_lines(engine, lines, options.out, dist)
        seconds = time.perf_counter() - started
    speech = sum(result["frames"] for result in results) / engine.store.frame_rate_hz
    return options.out, results, seconds / speech if speech else None


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[argparse.Namespace]]:
    """(arguments, those of `generate` for each model); raises ConfigError."""
    parser = parser_of("evaluate", __doc__)
    parser.add_argument("--ckpt", required=True, help="the model or run, as for generate, or a folder of its results")
    parser.add_argument("--against", help="another, to compare it with")
    parser.add_argument("--lines", type=Path, required=True, help="texts or records as for generate --lines, or a meta.lst")
    parser.add_argument("--out", type=Path, required=True, help="folder of takes, evaluation.json and evaluation.html")
    parser.add_argument("--asr_model", help=f"speech recognition (transformers), or none; default: {ASR_MODEL}")
    parser.add_argument("--sv_model", help=f"speaker verification: transformers, .pth, or none; default: {SV_MODEL}")
    parser.add_argument("--language", default="en", choices=LANGUAGES, help="of the texts")
    parser.add_argument(
        "--fail_if_worse",
        nargs="+",
        default=[],
        metavar="NAME:AMOUNT",
        help="exit with 1 if a figure is worse than the other model's by more, in points of the table: wer:0.5",
    )
    args, rest = parser.parse_known_args(argv)
    args.limits = {}
    for item in args.fail_if_worse:
        name, _, amount = item.partition(":")
        try:
            args.limits[SHORT.get(name, name)] = limit = float(amount)
        except ValueError:
            limit = math.nan
        if not 0 <= limit < math.inf:
            raise ConfigError(f"--fail_if_worse {item}: expected NAME:AMOUNT, such as wer:0.5")
    if len(args.limits) < len(args.fail_if_worse):
        raise ConfigError("--fail_if_worse: each figure once")
    known = [measure.name for measure in MEASURES if measure.better]
    if unknown := sorted(args.limits.keys() - {*known}):
        raise ConfigError(f"--fail_if_worse {unknown[0]}: choose from {', '.join([*SHORT, *known])}")
    if args.limits and not args.against:
        raise ConfigError("--fail_if_worse: there is nothing to compare with; give --against")
    args.titles = [args.ckpt, args.against] if args.against else [args.ckpt]
    args.spoken = args.out / "lines.jsonl" if args.lines.suffix == ".lst" else args.lines
    to_generate = [["--ckpt", ckpt, "--lines", str(args.spoken), "--out", str(args.out / key)] for ckpt, key in zip(args.titles, "ab")]
    options = [generate.parse_args([*each, *rest], parser._option_string_actions) for each in to_generate]
    if options[0].takes > 1:
        raise ConfigError("--takes: one take of each line is judged; give other seeds to several evaluations")
    args.voices = options[0].voices or generate.VOICES
    _choose_judges(args, options[0].codec)
    return args, options


def _choose_judges(args: argparse.Namespace, codec: str) -> None:
    """The default judges where none are given; ConfigError for those that would have nothing to judge, or are missed."""
    if not codec and (given := [name for name in ("asr_model", "sv_model") if getattr(args, name) not in (None, "none")]):
        raise ConfigError(f"--{given[0]}: judges waveforms, of which --audio_tokenizer none makes none")
    args.asr_model = (args.asr_model or ASR_MODEL) if codec else "none"
    args.sv_model = (args.sv_model or SV_MODEL) if codec else "none"
    for name in args.limits:
        judge = {"wer": "asr_model", "cer": "asr_model", "sim": "sv_model"}.get(name[:3])
        if judge and getattr(args, judge) == "none":
            raise ConfigError(f"--fail_if_worse {name}: needs {'--' + judge if codec else 'waveforms, so --audio_tokenizer'}")


def lines_of(args: argparse.Namespace, dist: Dist) -> list[Line]:
    """The lines with their texts as they were given, of a meta.lst too; raises DataError. Collective."""
    if args.spoken != args.lines:
        dist.together(lambda: write_lines(args.spoken, read_meta(args.lines)) if dist.is_main else None)
    return dist.together(lambda: read_lines(args.spoken, Chunking(normalize=False), args.voices))


def evaluate(
    args: argparse.Namespace, options: Sequence[argparse.Namespace], lines: Sequence[Line], dist: Dist
) -> tuple[dict, list[list[dict]]]:
    """(figures, takes of each model); raises UserError. Collective."""
    texts = dist.together(lambda: [text_of(line, args) for line in lines])
    spoken = [speak(each, dist) for each in options]
    judges = dist.main_first(lambda: Judges.load(args, options[0].codec, dist.device))
    names = {line.name for line in lines}
    for folder, results, _ in spoken:
        if others := sorted({result["name"] for result in results} - names):
            raise DataError(f"{folder}: holds results of other lines, such as {others[0]}; they have to be one for each of --lines")
    targets = {result["name"]: result.get("target_frames") for _, results, _ in spoken for result in results}
    takes = []
    for folder, results, _ in spoken:
        by_name = {result["name"]: result for result in results}

        def take(i: int) -> dict:
            name = lines[i].name
            return judges.take(lines[i], texts[i], by_name.get(name, {}), folder, targets.get(name))  # noqa: B023

        parts = dist.gather(dist.together(lambda: [take(i) for i in range(dist.rank, len(lines), dist.world_size)]))
        takes.append([parts[i % dist.world_size][i // dist.world_size] for i in range(len(lines))])
    return compare(takes, [rtf for *_, rtf in spoken]), takes


def text_of(line: Line, args: argparse.Namespace) -> str:
    """What is to be heard: the text as it was given, without speaker tags; raises DataError if it has no words."""
    text = " ".join(TAG.sub(" ", line.text).split())
    try:
        Errors.of("", text, args.language)
    except ValueError:
        raise DataError(f"{line.source}: text: {line.text!r} has no words to recognise") from None
    return text


@says_errors
def main(argv: Sequence[str]) -> int:
    args, options = parse_args(argv)
    dist = setup_distributed(options[0].device)
    lines = lines_of(args, dist)
    figures, takes = evaluate(args, options, lines, dist)
    if not dist.is_main:
        return 0
    rows = table(figures, short_names(args.titles))
    judged_by = {"asr_model": args.asr_model, "sv_model": args.sv_model} if options[0].codec else {}
    about = {"lines": str(args.lines), "num_lines": len(takes[0]), "models": args.titles, "judged_by": judged_by}
    content = about | {"figures": {name: asdict(figure) for name, figure in figures.items()}, "takes": takes}
    write_text(args.out / "evaluation.json", json.dumps(json_safe(content), ensure_ascii=False, indent=1) + "\n")
    write_text(args.out / "evaluation.html", render(about, rows, takes, lines, args.out))
    what = "both takes of each" if args.against else "the take of each"
    print(f"{render_text(rows)}\n{len(takes[0])} lines; {what}, worst first: {args.out / 'evaluation.html'}")
    for title, each in zip(args.titles, takes):
        if empty := [take["name"] for take in each if not take["frames"]]:
            log_list(dist, f"{title}: nothing was generated for {len(empty)} of {len(each)} lines, which count as wrong", empty)
    worse = find_worse(figures, args.limits)
    for item in worse:
        print(f"worse: {item}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
