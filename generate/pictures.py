"""Samples to look at and listen to: codes as pictures, beside the sounds that generation wrote.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import base64
import colorsys
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from generate.files import read_results

AGREES, DIFFERS, NOTHING = (214, 224, 214), (200, 60, 50), (255, 255, 255)
SOUNDS = {"said": "wav", "target": "target_wav", "reference": "reference_wav"}  # keys of results.jsonl


@dataclass(frozen=True)
class Medium:
    """One sample for TensorBoard or Weights & Biases."""

    tag: str
    text: str
    picture: np.ndarray  # [H, W, 3] uint8
    sounds: dict[str, Path]  # what it is -> a wav


def media(folder: Path) -> list[Medium]:
    """What the results.jsonl in `folder` describes."""
    return [
        Medium(
            f"samples/{result['name']}",
            result["text"],
            enlarge(figure(folder, result)),
            {kind: folder / result[key] for kind, key in SOUNDS.items() if key in result},
        )
        for result in read_results(folder)
    ]


def figure(folder: Path, result: dict) -> np.ndarray:
    """`codes_figure` of a line of results.jsonl."""
    codes = np.load(folder / result["codes"], allow_pickle=False)
    target = np.load(folder / result["target_codes"], allow_pickle=False) if "target_codes" in result else None
    return codes_figure(codes, target)


def codes_figure(codes: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """Generated codes against their target: the target, the generated codes, and below where they differ (red).

    codes, target: [K, T], of different T perhaps
    returns: [rows, T, 3] uint8, a pixel for a code, equal codes in equal colours; without a target the codes alone
    """
    if target is None:
        return paint(codes)
    T = max(codes.shape[1], target.shape[1])
    made, wanted = (np.pad(c.astype(np.int64), ((0, 0), (0, T - c.shape[1])), constant_values=-1) for c in (codes, target))
    agreement = np.where((made == wanted)[..., None], np.uint8(AGREES), np.uint8(DIFFERS))
    gap = np.full((1, T, 3), NOTHING, np.uint8)
    return np.concatenate([paint(wanted), gap, paint(made), gap, agreement])


def paint(codes: np.ndarray) -> np.ndarray:
    """[K, T] -> [K, T, 3] uint8: neighbouring codes get distant hues, and a missing code (-1) is white."""
    palette = [
        colorsys.hsv_to_rgb(code * 0.618034 % 1, 0.35 + 0.4 * (code % 3) / 2, 0.92)
        for code in range(np.max(codes, initial=0) + 1)
    ]
    colours = np.array([*(tuple(round(255 * part) for part in colour) for colour in palette), NOTHING], np.uint8)
    return colours[codes]


def as_url(image: np.ndarray) -> str:
    """A picture [H, W, 3] as the source of an <img>."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def enlarge(image: np.ndarray) -> np.ndarray:
    """Every pixel as a block of pixels, so that a figure of few frames is wide as well; one of none is a white line."""
    image = image if image.shape[1] else np.full((len(image), 1, 3), NOTHING, np.uint8)
    return image.repeat(6, axis=0).repeat(max(4, 640 // max(1, image.shape[1])), axis=1)
