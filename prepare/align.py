"""Which words of a written script each clip holds, by the words that speech recognition found in it.

All recognised words are aligned to the script at once, which says about where each clip stands; then each clip by itself is
fitted into the script around that place. So paragraphs that nobody read, sentences that were read twice and words that were
misrecognised do no harm.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import accumulate, pairwise
from statistics import median_low

from rapidfuzz.distance import Levenshtein
from rapidfuzz.fuzz import ratio

MAX_COST = 0.3  # of a clip's words: what may differ between recogniser and script
ADDED_COST, CHANGED_COST = 1.05, 1.1  # of a word, at most; a missing one costs 1: recognisers miss more than they add
SPLIT_COST = 0.1  # of one word where the other side has two: nobody, no body
SLACK = 0.1  # by which a range may get worse when it takes in a word that no clip has
NUMBER_COST = 0.35  # of each word of a number that has digits on the other side; above MAX_COST: it stands for no sentence
MAX_GAP = 5  # words
MARGIN = 8  # words around a clip's place
WORD = re.compile(r"[\u2e80-\u312f\u3400-\u9fff]|[^\s\u2e80-\u312f\u3400-\u9fff]+")  # Chinese and Japanese: each character

Range = tuple[int, int]  # first word, and the one after the last


def words_of(text: str) -> list[tuple[str, int]]:
    """(the word in small letters without punctuation, where it begins) of each word."""
    found = ((unicodedata.normalize("NFKC", word[0]).casefold(), word.start()) for word in WORD.finditer(text))
    plain = (("".join(filter(str.isalnum, word)), start) for word, start in found)
    return [(word, start) for word, start in plain if word]


def align(clips: Sequence[Sequence[str]], script: Sequence[str]) -> list[Range | None]:
    """The range of the script's words for each clip, in the order they were read; None where the clip fits nowhere."""
    firsts = list(accumulate(map(len, clips), initial=0))
    spoken = [word for clip in clips for word in clip]
    same = [(a + i, b + i) for a, b, size in Levenshtein.opcodes(spoken, script).as_matching_blocks() for i in range(size)]
    there = dict(same)  # recognised word -> word of the script
    found: list[Range | None] = []
    last = (0, 0)
    for clip, (first, stop) in zip(clips, pairwise(firsts)):
        offsets = [there[i] - (i - first) for i in range(first, stop) if i in there]
        places = dict.fromkeys([*([median_low(offsets)] if offsets else []), *last])  # a sentence may have been read again
        cost, place = min((fit(clip, script, place) for place in places), key=lambda item: item[0])
        found.append(place if cost <= MAX_COST else None)
        last = found[-1] or last
    return _close_gaps(clips, script, found)


def fit(clip: Sequence[str], script: Sequence[str], place: int) -> tuple[float, Range]:
    """(what differs, as a share of the words; the range) of the best fit in the words around `place`."""
    start = max(0, place - MARGIN - len(clip) // 4)
    window = script[start : place + MARGIN + len(clip) * 3 // 2]
    ends = [(cost, start + first, start + stop) for stop, (cost, first) in enumerate(_costs(clip, window, is_free=True))]
    cost, first, stop = min(ends, key=lambda end: (end[0], end[2] - end[1], abs(end[1] - place)))
    return cost / max(len(clip), stop - first) if clip else 1.0, (first, stop)


def _costs(clip: Sequence[str], window: Sequence[str], is_free: bool) -> list[tuple[float, int]]:
    """(cost, first word) of the best alignment of the whole clip to words of the window, for each end of these.

    A word may be two on the other side, a number in digits any number of words. is_free: the words may begin anywhere
    in the window, otherwise at its first
    """
    rows = [[(0.0, -j) if is_free else (float(j), 0) for j in range(len(window) + 1)]]  # negative, so that late starts win ties
    for i, word in enumerate(clip, 1):
        rows.append([(rows[-1][0][0] + ADDED_COST, rows[-1][0][1])])
        for j, other in enumerate(window, 1):
            is_number = word.isdecimal() != other.isdecimal()
            steps = [(1, 1, 0.0 if is_number else min(CHANGED_COST, 2 - ratio(word, other) / 50))]
            steps += [(1, 0, NUMBER_COST if is_number and other.isdecimal() else ADDED_COST)]
            steps += [(0, 1, NUMBER_COST if is_number and word.isdecimal() else 1.0)]
            steps += [(1, 2, SPLIT_COST)] if j > 1 and word == window[j - 2] + other else []
            steps += [(2, 1, SPLIT_COST)] if i > 1 and clip[i - 2] + word == other else []
            before = ((*rows[i - di][j - dj], more) for di, dj, more in steps)
            rows[i].append(min((cost + more, start) for cost, start, more in before))
    return [(cost, -start) for cost, start in rows[-1]]


def _close_gaps(clips: Sequence[Sequence[str]], script: Sequence[str], found: list[Range | None]) -> list[Range | None]:
    """Few words between neighbours belong to the one that has misrecognised words, or a number, at this end."""
    found, clips = [(0, 0), *found, (len(script), len(script))], [[], *clips, []]
    for i in range(len(found) - 1):
        gap = found[i + 1][0] - found[i][1] if found[i] and found[i + 1] else 0
        if not 0 < gap <= MAX_GAP:
            continue
        wider = {i: (found[i][0], found[i + 1][0]), i + 1: (found[i][1], found[i + 1][1])}
        for k, place in wider.items():
            now, then = (_costs(clips[k], script[slice(*at)], is_free=False)[-1][0] for at in (found[k], place))
            is_number = "".join(clips[k][-1:] if k == i else clips[k][:1]).isdecimal()
            if then <= now + gap * (NUMBER_COST if is_number else SLACK):
                found[k] = place
                break
    return found[1:-1]
