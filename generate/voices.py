"""Who speaks: reference clips by path or by name, their transcripts, written profiles.

A voice of `ref_audio` is one of these; several are a list, or separated by commas:

    anna/001.wav                 a file, a waveform or codes
    belinda                      a file VOICES/belinda.wav (.flac, .mp3, .ogg, .npy, .safetensors)
    profile:male_en              the profile of that name in VOICES/profile.yaml
    profile:A deep, calm voice   a profile of one's own

The .txt beside a clip is its transcript, unless `ref_text` gives another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from common import DataError, split_list
from generate.files import SOUND_SUFFIXES
from prepare.manifest import CODE_SUFFIXES, leaves_folder
from prepare.prompts import PROFILE, Voice

VOICES = Path("voices")  # where named voices are by default
PROFILES = "profile.yaml"


def find_voices(names: Sequence[str], texts: Sequence[str], in_system: bool, folder: Path, voices: Path) -> list[Voice]:
    """The voices of SPEAKER0, SPEAKER1, ...; those without a transcript belong into the system turn.

    names, texts: ref_audio and ref_text, relative to `folder`; without texts, the .txt files beside the clips
    in_system:    leave transcripts out
    voices:       the folder of named voices and profiles
    raises:       DataError for what does not exist, contradicts or would be ignored
    """
    names = [name for item in names for name in _split(item, folder)]
    has_profile = any(name.startswith(PROFILE) for name in names)
    if in_system and not names:
        raise DataError("ref_in_system: there is no ref_audio that could go into the system turn")
    if texts and (in_system or has_profile):
        reason = "ref_in_system" if in_system else "a written profile"
        raise DataError(f"ref_text: with {reason}, references go into the system turn without transcripts; leave ref_text out")
    if texts and not names:
        raise DataError("ref_text: there is no ref_audio whose transcript it could be")
    if texts and len(texts) != len(names):
        raise DataError(f"{len(names)} ref_audio but {len(texts)} ref_text; give every transcript, or none")
    found = [_find(name, folder, voices) for name in names]
    if in_system or has_profile:
        return found
    if texts:
        return [replace(voice, text=text_or_file(text, folder, "ref_text")) for voice, text in zip(found, texts)]
    beside = [(folder / voice.clip["audio_url"]).with_suffix(".txt") for voice in found]
    missing = [path for path in beside if not is_file(path)]
    if missing and len(missing) < len(beside):
        raise DataError(f"{missing[0]} does not exist, but the other voice has a transcript; give ref_text, or ref_in_system")
    return [replace(voice, text=read_text(path, "transcript")) for voice, path in zip(found, beside)] if not missing else found


def _split(item: str, folder: Path) -> list[str]:
    """The voices of a list with commas. A comma before a blank belongs to the words of a profile."""
    if is_file(folder / item):
        return [item]
    parts = re.split(r",(?! )", item)
    return [name for part in parts for name in ([part.strip()] if part.startswith(PROFILE) else split_list(part))]


def _find(name: str, folder: Path, voices: Path) -> Voice:
    if name.startswith(PROFILE):
        return Voice(profile=_profile(name.removeprefix(PROFILE).strip(), voices))
    named = [voices / f"{name}{suffix}" for suffix in (*SOUND_SUFFIXES, *CODE_SUFFIXES)]
    path = next((path for path in named if is_file(path)), None)
    if is_file(folder / name) or (not path and (Path(name).suffix or os.sep in name)):
        if folder == Path() and not is_file(Path(name)):
            raise DataError(f"--ref_audio {name}: no such file")
        # The command line may name any file, a manifest none outside its folder.
        return Voice({"type": "audio", "audio_url": os.path.abspath(name) if folder == Path() else name})
    if not path:
        known = sorted({file.stem for file in voices.glob("*") if file.suffix in (*SOUND_SUFFIXES, *CODE_SUFFIXES)})
        raise DataError(f"ref_audio {name}: neither a file nor a voice of {voices}/, which has {', '.join(known) or 'none'}")
    return Voice({"type": "audio", "audio_url": os.path.abspath(path)})


def _profile(profile: str, voices: Path) -> str:
    """A profile by its name or in words."""
    path, known = voices / PROFILES, {}
    if is_file(path):
        try:
            known = yaml.safe_load(read_text(path, "profiles"))["profiles"]
            known = {str(name): str(text).strip() for name, text in known.items()}
        except (yaml.YAMLError, TypeError, KeyError, AttributeError):
            raise DataError(f"{path}: expected `profiles:` with a line `name: description` for each") from None
    if profile not in known and " " not in profile:
        raise DataError(f"ref_audio profile:{profile}: {path} has {', '.join(known) or 'no profiles'}; or describe the voice in words")
    return known.get(profile, profile)


def text_or_file(value: str, folder: Path, what: str) -> str:
    """A text, or the content of the file that it names; raises DataError for a file that is not there."""
    if is_file(folder / value) and (folder == Path() or not leaves_folder(value)):
        return read_text(folder / value, what)
    if value.endswith(".txt"):
        raise DataError(f"{what} {value}: no such file; a text of its own does not end with .txt")
    return value


def read_text(path: Path, what: str) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path}: cannot be read: {error}") from None
    if not text:
        raise DataError(f"{what} {path}: the file is empty")
    return text


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that the file system cannot hold, such as a long text
        return False
