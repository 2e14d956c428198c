"""What ruins a voice though training on it runs: faults of clips and of texts, each with a remedy.

Listener       measures a clip block by block
sound_faults   (title, what and where) of a clip
text_faults    the same of a text
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SILENT = 10 ** (-60 / 20)  # a block of 20 ms whose largest value is below -60 dB counts as silent
CLIPPED = 0.999  # absolute sample values from here on count as clipped
QUIET = 0.01  # of the loud blocks: pauses at the ends of a clip
SPECTRUM_SIZE = 2048
HEARD = 1e-8  # -80 dB of the loudest band: what is below is noise of the codec or of 16 bits


@dataclass(frozen=True)
class Sound:
    """Figures of a waveform; levels are shares of full scale, times in seconds."""

    clipped_share: float
    flat_share: float  # runs of equal values at the loudest level: clipped, and then made quieter
    silent_share: float
    lead_sec: float
    tail_sec: float
    dc: float
    snr_db: float
    bandwidth_hz: float
    channel_match: float  # correlation of the first two channels; 1 for one channel


class Listener:
    """Measures a waveform block by block, in memory that does not grow with it but for two numbers per 20 ms."""

    def __init__(self, rate_hz: int, num_channels: int):
        self.rate_hz, self.num_channels = rate_hz, num_channels
        self.block_size = max(1, rate_hz // 50)
        self.peaks: list[np.ndarray] = []
        self.powers: list[np.ndarray] = []
        self.num_samples = self.num_clipped = self.num_flat = 0
        self.peak = self.total = 0.0
        self.spectrum = np.zeros(SPECTRUM_SIZE // 2 + 1)
        self.products = np.zeros(3)  # left * right, left ** 2, right ** 2

    def add(self, samples: np.ndarray) -> None:
        """samples: [n, channels], n a multiple of `block_size` but for the last"""
        mono = samples.mean(axis=1)
        loudness = np.abs(samples).max(axis=1)
        starts = np.arange(0, len(samples), self.block_size)
        sizes = np.diff(np.append(starts, len(samples)))
        self.peaks.append(np.maximum.reduceat(loudness, starts))
        self.powers.append(np.add.reduceat(mono.astype(np.float64) ** 2, starts) / sizes)
        self.num_samples += len(samples)
        self.num_clipped += int((loudness >= CLIPPED).sum())
        self.total += float(mono.sum(dtype=np.float64))
        if loudness.max() > self.peak:
            self.peak, self.num_flat = float(loudness.max()), 0
        self.num_flat += int(((loudness[1:] == loudness[:-1]) & (loudness[1:] == self.peak)).sum())
        if self.num_channels > 1:
            left, right = samples[:, 0].astype(np.float64), samples[:, 1].astype(np.float64)
            self.products += (left @ right, left @ left, right @ right)
        frames = mono[: len(mono) // SPECTRUM_SIZE * SPECTRUM_SIZE].reshape(-1, SPECTRUM_SIZE)
        if len(frames):
            self.spectrum += (np.abs(np.fft.rfft(frames * np.hanning(SPECTRUM_SIZE))) ** 2).sum(axis=0)

    def sound(self) -> Sound:
        peaks, powers = np.concatenate(self.peaks), np.concatenate(self.powers)
        loud = max(SILENT, QUIET * float(np.quantile(peaks, 0.95)))
        spoken = np.flatnonzero(peaks > loud)
        first, last = (int(spoken[0]), int(spoken[-1]) + 1) if len(spoken) else (0, len(peaks))
        noise, level = np.quantile(powers, [0.05, 0.95])
        bands = np.flatnonzero(self.spectrum > HEARD * self.spectrum.max())
        match = self.products[0] / np.sqrt(self.products[1] * self.products[2]) if self.products[1:].all() else 1.0
        return Sound(
            clipped_share=self.num_clipped / self.num_samples,
            flat_share=self.num_flat / self.num_samples if self.peak > 0.01 else 0.0,
            silent_share=float((peaks < SILENT).mean()),
            lead_sec=first * self.block_size / self.rate_hz,
            tail_sec=(len(peaks) - last) * self.block_size / self.rate_hz,
            dc=abs(self.total / self.num_samples),
            snr_db=float(10 * np.log10((level + 1e-12) / (noise + 1e-12))),
            bandwidth_hz=float(bands[-1] * self.rate_hz / SPECTRUM_SIZE) if len(bands) else self.rate_hz / 2,
            channel_match=float(match),
        )


def sound_faults(sound: Sound | None, sec: float, rate_hz: int) -> Iterator[tuple[str, str]]:
    """(title with its remedy, the figure) of each fault of a clip. sound: None for codes"""
    if sec < 1:
        yield "shorter than 1 s: too short to learn a voice from", f"{sec:.2f} s"
    if sec > 60:
        yield "longer than 60 s", f"{sec:,.0f} s"
    elif sec > 30:
        yield "longer than 30 s: cut them at pauses", f"{sec:.1f} s"
    if sound is None:
        return
    if max(sound.clipped_share, sound.flat_share) > 0.001:
        share = max(sound.clipped_share, sound.flat_share)
        yield "clipped: record them again, or leave them out", f"{share:.1%} of its samples"
    if sound.silent_share > 0.5:
        yield "mostly silent", f"{sound.silent_share:.0%} below -60 dB"
    elif sound.lead_sec > 0.5 or sound.tail_sec > 0.5:
        ends = f"{sound.lead_sec:.2f} s before and {sound.tail_sec:.2f} s after the speech"
        yield "silence at the ends, which is learnt: cut it to 0.2 s", ends
    if sound.dc > 0.01:
        yield "DC offset: apply a high-pass filter", f"{sound.dc:.1%} of full scale"
    if sec > 1 and sound.snr_db < 15 and sound.silent_share < 0.5:
        yield "noisy: the pauses are almost as loud as the speech", f"{sound.snr_db:.0f} dB"
    if rate_hz >= 16000 and sound.bandwidth_hz < min(5500, 0.35 * rate_hz):
        yield (
            "narrow: less than its sample rate promises, as from a telephone",
            f"up to {sound.bandwidth_hz:,.0f} Hz at {rate_hz} Hz",
        )
    if sound.channel_match < 0.5:
        yield "channels that differ: two microphones or two speakers, which are mixed", f"correlation {sound.channel_match:.2f}"


TEXT_FAULTS = {
    "invisible characters: remove them": re.compile(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\u00ad]"
    ),
    "HTML: replace entities and tags by what they mean": re.compile(
        r"&(?:#\d+|[a-z]{2,8});|</?(?:p|br|b|i|em|strong|span|div)\b", re.I
    ),
    "addresses, which nobody reads out like this": re.compile(r"https?://|www\.|\S@\S+\.\w"),
    "wrongly decoded: read the file with its own encoding": re.compile(r"[ÃÂ][\x80-\xbf\u00a0-\u00bf]|â€.|\ufffd|ï»¿"),
    "special tokens of the model: take them out": re.compile(r"<\|[^|>]*\|>"),
    "digits: the model has to learn how each is read out; spell them out": re.compile(r"\d"),
    "symbols that are read out: spell them out": re.compile(r"[%$€£¥&+=#@*/\\^~|_]"),
}
SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK", "HEBREW", "THAI")
TAGS = re.compile(r"\[SPEAKER\d+\]|</?SE(?:_[se])?>|\[[A-Za-z ]+\]")


def text_faults(text: str) -> Iterator[tuple[str, str]]:
    """(title with its remedy, what was found) of each fault of a text."""
    text = TAGS.sub(" ", text)
    for title, pattern in TEXT_FAULTS.items():
        found = pattern.search(text)
        if found:
            yield title, repr(found[0])
            text = pattern.sub(" ", text)


def script_of(text: str) -> str:
    """The script of most of its letters; Japanese where there is kana; "" without letters."""
    names = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    known = Counter({name: count for name, count in names.items() if name in SCRIPTS})
    if not known:
        return ""
    if known["HIRAGANA"] + known["KATAKANA"]:
        return "Japanese"
    return {"CJK": "Chinese"}.get(known.most_common(1)[0][0], known.most_common(1)[0][0].capitalize())


def odd_scripts(scripts: Sequence[str]) -> set[str]:
    """The scripts of less than a tenth of the texts, beside one that most of them have."""
    counts = Counter(filter(None, scripts))
    total = sum(counts.values())
    return {script for script, count in counts.items() if count < 0.1 * total} if len(counts) > 1 else set()


def place(name: str, text: str, sec: float, what: Any) -> str:
    """One finding as a line: the clip, its seconds, what was found, its text."""
    shown = text if len(text) <= 60 else text[:59] + "…"
    return f"{name} ({sec:.1f} s): {what}" + (f" | {shown}" if shown else "")
