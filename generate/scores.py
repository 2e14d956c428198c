"""How generated codes compare with a target, and a transcript with its text.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import jiwer
import numpy as np
from torch import Tensor

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"  # scripts in which every character counts as a word
WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words of a text without speaker tags, punctuation and capitals."""
    text = re.sub(r"\[SPEAKER\d+\]", " ", text).casefold().replace("'", "").replace("\u2019", "")
    return WORD.findall(re.sub(r"[^\w\s]|_", " ", text))


def word_errors(transcript: str, text: str) -> tuple[int, int]:
    """(words to insert, delete or replace to get from the transcript to the text, words of the text)."""
    wanted = words_of(text)
    edits = jiwer.process_words(" ".join(wanted), " ".join(words_of(transcript)))
    return edits.substitutions + edits.deletions + edits.insertions, len(wanted)


# A runaway is an answer that got stuck. Frames are compared by their first codebooks: in a residual codec these carry most of
# the sound, and the fine ones differ between two utterances of the same. A second has 25 frames. Chosen, not measured.
COARSE = 2  # codebooks that are compared
SPAN_FRAMES = 50  # shortest runaway: pauses in a sentence are below 2 s
LONGEST_CYCLE = 50  # frames of what a loop repeats: a few words
MIN_CYCLES = 3  # a text itself may say something twice


def find_runaway(codes: Tensor) -> str | None:
    """Whether an answer got stuck: "silence" if it holds one frame, "loop" if it repeats a longer cycle.

    codes: [K, T] int
    """
    T = codes.shape[1]
    columns = codes[:COARSE].numpy()
    for cycle in range(1, min(LONGEST_CYCLE, T // 2) + 1):
        differs = np.flatnonzero((columns[:, cycle:] != columns[:, :-cycle]).any(0))
        repeated = np.diff(np.concatenate([[-1], differs, [T - cycle]])).max() - 1
        if repeated + cycle >= max(SPAN_FRAMES, MIN_CYCLES * cycle):
            return "silence" if cycle == 1 else "loop"
    return None


@dataclass(frozen=True)
class Score:
    """How well clips agree with their targets; add them with `+`."""

    num_clips: int = 0
    stopped: int = 0  # ended by themselves, and not before they began
    timely: int = 0  # ... at the right length
    exact: int = 0  # every code is right
    matching: int = 0  # codes that agree
    compared: int = 0  # codes of the longer of the two
    frames: int = 0
    target_frames: int = 0
    runaways: int = 0  # see `find_runaway`

    @classmethod
    def of(cls, codes: Tensor, stopped: bool, target: Tensor) -> Score:
        """codes, target: [K, T], T may differ; a target without frames is none, and only the ending is scored"""
        K, T = target.shape
        stopped = stopped and codes.shape[1] > 0
        if not T:
            return cls(1, int(stopped), runaways=int(find_runaway(codes) is not None))
        shared = min(codes.shape[1], T)
        matching = int((codes[:, :shared] == target[:, :shared]).sum())
        compared = max(codes.shape[1], T) * K
        timely = stopped and codes.shape[1] == T
        exact, is_runaway = matching == compared, find_runaway(codes) is not None
        return cls(1, int(stopped), int(timely), int(exact), matching, compared, codes.shape[1], T, int(is_runaway))

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    @property
    def code_match(self) -> float:
        """The share of codes that agree. Real speech can be said in many ways, so it is far below 1 there."""
        return self.matching / max(1, self.compared)

    def metrics(self) -> dict[str, float | int]:
        return {
            "num_samples": self.num_clips,
            "stop_rate": self.stopped / max(1, self.num_clips),
            "duration_ratio": self.frames / max(1, self.target_frames),
            "code_match": self.code_match,
            "exact_clips": self.exact,
            "runaway_rate": self.runaways / max(1, self.num_clips),
        }

    def __str__(self) -> str:
        clips = f"exact clips {self.exact:2d}/{self.num_clips}   correct stops {self.timely:2d}/{self.num_clips}"
        return f"codes {self.code_match:6.1%}   {clips}   runaways {self.runaways:2d}/{self.num_clips}"


def table(scores: dict[str, Score]) -> str:
    """Scores by kind of record, one per line."""
    return "\n".join(f"  {kind:36} {score}" for kind, score in scores.items())
