"""What the figures of a run say, in words: of metrics.jsonl, for the report and for whoever trains without reading curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from generate.best import contradictions

RISING = 1.01  # a validation loss this many times its lowest value is rising
CLIPS = "trim the clips' ends (prepare check --trim) and train longer"


@dataclass(frozen=True)
class Verdict:
    title: str
    kind: str  # good, fair or bad
    value: str
    text: str


@dataclass(frozen=True)
class Rule:
    """What a figure of the last evaluation ("val") or sampling says. good, fair: ranges; outside of both it is bad"""

    split: str
    figure: str
    title: str
    good: tuple[float, float]
    fair: tuple[float, float]
    praise: str
    remedy: str

    def judge(self, value: float) -> Verdict:
        kinds = [kind for kind, (low, high) in (("good", self.good), ("fair", self.fair)) if low <= value <= high]
        text = self.praise if kinds[:1] == ["good"] else self.remedy
        return Verdict(self.title, [*kinds, "bad"][0], f"{value:.1%}".replace("%", " %"), text)


RULES = (
    Rule("sample", "stop_rate", "samples that end by themselves", (0.9, 1), (0.5, 1), "they stop in time",
         f"they run on: {CLIPS}"),
    Rule("val", "eos_accuracy", "ends of clips predicted", (0.9, 1), (0.5, 1), "the model has learned where clips end",
         f"the model has not learned where clips end: {CLIPS}"),
    Rule("val", "copy_share", "copy share", (0, 0.1), (0, 0.5), "the model does not repeat its input",
         "the model repeats its input and would generate silence: start from the published base"),
    Rule("sample", "runaway_rate", "samples stuck in a loop or in silence", (0, 0), (0, 0.25), "none",
         "listen to earlier checkpoints; generate with another --seed or a lower --temperature"),
    Rule("sample", "duration_ratio", "length of samples against their targets", (0.8, 1.25), (0.6, 1.6), "about the same",
         "listen for missing words and for pauses"),
    Rule("sample", "word_error_rate", "wrong words in samples", (0, 0.1), (0, 0.3), "texts are read as they are written",
         "words are missing or wrong: check the transcripts (prepare check --transcripts) and train longer"),
)  # fmt: skip


def find(lines: Mapping[str, Sequence[dict]]) -> list[Verdict]:
    """Of each figure that was measured. lines: of metrics.jsonl, by split"""
    found = loss_trend(*points(lines.get("val", []), "loss"))
    for rule in RULES:
        found += [rule.judge(value) for value in points(lines.get(rule.split, []), rule.figure)[1][-1:]]
    found += [Verdict("samples against the loss", "bad", "", text) for text in against_the_loss(lines)]
    skipped = sum(line.get("bad_steps") or 0 for line in lines.get("train", [])[-1:])
    text = "their loss or gradient was not finite; spikes/ has their samples"
    return found + [Verdict("steps skipped", "fair", show(skipped), text)] * bool(skipped)


def loss_trend(steps: Sequence[float], values: Sequence[float]) -> list[Verdict]:
    """Of a validation loss; nothing without one."""
    if not values:
        return []
    lowest, earlier = int(np.argmin(values)), values[-1 - max(1, len(values) // 4)] if len(values) > 1 else 0
    if len(values) == 1:
        kind, text = "fair", "one evaluation shows no trend"
    elif values[-1] > RISING * values[lowest]:
        kind, text = (
            "bad",
            f"rising since step {steps[lowest]:,} ({show(values[lowest])}): overfitting; that step is the better model",
        )
    elif values[-1] < earlier / RISING:
        kind, text = "good", "still falling: training longer may help"
    else:
        kind, text = "good", "no longer falling: more steps of the same will not help"
    return [Verdict("validation loss", kind, show(values[-1]), text)]


def against_the_loss(lines: Mapping[str, Sequence[dict]]) -> list[str]:
    """How the last samples contradict the validation loss, if they do."""
    kept, found, losses = {}, [], dict(zip(*points(lines.get("val", []), "loss")))
    for line in lines.get("sample", []):
        before = [step for step in losses if step <= line["step"]]
        kept, found = contradictions(kept, losses[max(before)] if before else None, line, line["step"])
    return found


def points(lines: Sequence[dict], name: str, index: int | None = None) -> tuple[list[float], list[float]]:
    """(steps, values) of a figure, where it is a number; or of item `index` of a list."""
    found = []
    for line in lines:
        value = line.get(name)
        value = value[index] if index is not None and isinstance(value, list) else value
        if isinstance(value, (int, float)):
            found.append((line["step"], value))
    return [step for step, _ in found], [value for _, value in found]


def show(value: float) -> str:
    """A number in few digits."""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.3g}"
