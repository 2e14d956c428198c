"""A vocoder for toy voices, so that the demo can be heard: letters are formants, the timbre is pitch and colour.

It is a formula, has no weights and is used by the demo alone. Equal codes sound equal, a wrong code is heard: codebook 0
and 1 move the formants, 2 is the pitch, 3 vibrato, 4 brightness, 5 how hollow, 6 how breathy, 7 the size of the speaker.

Legend: K codebooks, T frames, N samples, H harmonics.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tools.toys import LETTERS, NUM_TIMBRES, SILENCE

# Formants in Hz of the vowels; other letters get their own pair from a grid.
VOWELS = {"a": (750, 1250), "e": (480, 1950), "i": (290, 2350), "o": (450, 850), "u": (320, 680)}
NUM_HARMONICS = 48


class ToyVocoder:
    """Decodes as the official codec does: `decode(codes)` and `sampling_rate`."""

    sampling_rate = 16000
    frame_samples = 1760  # 0.11 s: slow enough to tell letters apart

    def decode(self, codes: Tensor) -> np.ndarray:
        """codes [1, K, T] -> [1, 1, N] float32 between -1 and 1"""
        columns = codes[0].numpy().astype(float)
        T = columns.shape[1]
        if not T:
            return np.zeros((1, 1, 0), np.float32)
        position = (np.arange(T * self.frame_samples) + 0.5) / self.frame_samples - 0.5  # in frames
        smooth = [np.interp(position, np.arange(T), row) for row in _controls(columns)]
        f1, f2, f3, loudness, pitch, vibrato, tilt, hollow, breath = smooth
        wobble = 1 + 0.02 * vibrato * np.sin(2 * np.pi * 5.5 * position * self.frame_samples / self.sampling_rate)
        phase = 2 * np.pi * np.cumsum(pitch * wobble) / self.sampling_rate
        number = np.arange(1, NUM_HARMONICS + 1)[:, None]  # [H, 1] beside [N]
        hertz = number * pitch
        envelope = sum(_resonance(hertz, centre, width) for centre, width in ((f1, 90), (f2, 130), (f3, 220)))
        weights = envelope * number ** -(0.3 + tilt) * np.where(number % 2, 1, 1 - hollow) * (hertz < self.sampling_rate / 2.2)
        voiced = (weights * np.sin(number * phase)).sum(0)
        noise = np.random.default_rng(0).standard_normal(len(position)) * envelope.sum(0) / NUM_HARMONICS
        wave = loudness * (voiced + breath * noise)
        fade = np.minimum(1, np.minimum(position + 0.5, T - 0.5 - position) * 8)
        return (0.7 * fade * wave / max(1e-9, np.abs(wave).max(initial=0.0)))[None, None].astype(np.float32)


def _controls(codes: np.ndarray) -> list[np.ndarray]:
    """Nine rows [T]: three formants and loudness by letter; pitch, vibrato, tilt, hollowness and breath by timbre.

    codes: [K, T]; every code means something, also those that no toy voice has
    """
    letter, detail, *timbre = codes
    pitch, vibrato, tilt, hollow, breath, size = (code / NUM_TIMBRES for code in timbre)
    vowels = [VOWELS.get(LETTERS[int(i)]) if i < len(LETTERS) else None for i in letter]
    f1 = np.array([v[0] if v else 260 + 90 * (i % 6) for v, i in zip(vowels, letter)])
    f2 = np.array([v[1] if v else 900 + 330 * (i // 6) for v, i in zip(vowels, letter)])
    f3 = 2300 + 25 * detail
    scale = 0.85 + 0.3 * size
    is_silent = np.isin(letter, (LETTERS.index(" "), SILENCE[0]))
    loudness = np.where(is_silent, 0.0, np.where([v is not None for v in vowels], 1.0, 0.6))
    return [f1 * scale, f2 * scale, f3 * scale, loudness, 85 * 2 ** (1.6 * pitch), vibrato, tilt, hollow, 3 * breath]


def _resonance(hertz: np.ndarray, centre: np.ndarray, width: float) -> np.ndarray:
    """[H, N] the gain of a formant."""
    return 1 / (1 + ((hertz - centre) / width) ** 2)
