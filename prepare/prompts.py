"""How a request is phrased, in one place: as upstream's examples/generation.py phrases it. ChatML dicts in, ChatML dicts out.

    context(text, voices, scene, system)    the turns before a text
    record(text, clip, voices, ...)         the same with the text and its clip: a training record
    voices_of(clips, texts, ...)            voices as a table's row gives them
    oddity(turns, text)                     how the turns before a text differ from what inference sends
    normalise(text)                         a text to be spoken, in the form that the model gets to see
    Phrasing                                a mixture of phrasings, for data that does not say which

The turns before a text depend on what is known of its speakers:

    voices                        turns before the text
    ----------------------------  --------------------------------------------------------------------------------
    none, one speaker             system: INSTRUCTION and the scene, if there is one
    none, several [SPEAKERn]      system: SEVERAL_SPEAKERS, the scene, "SPEAKER0: feminine", "SPEAKER1: masculine", ...
    clips, all with transcripts   system: INSTRUCTION and the scene, only if there is a scene;
                                  then for each clip an exchange: its transcript, its audio
    anything else                 system: INSTRUCTION, the scene, and "SPEAKERn: " with the clip or profile of each voice
"""

from __future__ import annotations

import itertools
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common import DataError

INSTRUCTION = "Generate audio following instruction."
SEVERAL_SPEAKERS = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following text, "
    "using the specified voice.\n"
    "If no speaker tag is present, select a suitable voice on your own."
)
QUIET_ROOM = "Audio is recorded from a quiet room."  # the official default scene
TAG = re.compile(r"\[(SPEAKER\d+)\]")
SPANS = (("humming", "Humming"), ("music", "Music"), ("sing", "Singing"))
CHARACTERS = str.maketrans(
    {
        **dict(zip("，。：；？！【】《》“”「」『』‘’、—…·", [", ", *".:;?![]<>", *'""' * 3, *"'',-", "...", "."])),
        **dict.fromkeys("()（）", " "),
    }
)
WORDS = {
    "°F": " degrees Fahrenheit",
    "°C": " degrees Celsius",
    **{f"[{sound}]": f"<SE>[{sound.title()}]</SE>" for sound in ("music", "applause", "cheering", "cough")},
    **{f"[{name} start]": f"<SE_s>[{tag}]</SE_s>" for name, tag in SPANS},
    **{f"[{name} end]": f"<SE_e>[{tag}]</SE_e>" for name, tag in SPANS},
    "[laugh]": "<SE>[Laughter]</SE>",
}
ENDS = (*".!?,;\"'", "</SE_e>", "</SE>")
CLIP = "\0"  # a clip, where a turn is written as one text
PROFILE = "profile:"  # of a reference that describes a voice in words


@dataclass(frozen=True)
class Voice:
    """How one speaker sounds: a reference clip, perhaps with its transcript, or else a written profile."""

    clip: dict | None = None  # a ChatML audio part
    text: str | None = None  # its transcript
    profile: str | None = None


def voices_of(clips: Sequence[Any], texts: Sequence[Any], as_part: Callable[[Any], dict], source: str) -> list[Voice]:
    """Voices from references: clips, or `profile:` and a description. texts: their transcripts, or none

    as_part: the ChatML audio part of a clip; source: for messages
    raises:  DataError for a number of transcripts that does not fit, or one that is no text
    """
    if texts and len(texts) != len(clips):
        raise DataError(f"{source}: {len(clips)} ref_audio but {len(texts)} ref_text; give every transcript, or none")
    voices = []
    for clip, text in itertools.zip_longest(clips, texts):
        if not isinstance(text, (str, type(None))):
            raise DataError(f"{source}: ref_text: expected text, found {text!r}")
        is_profile = isinstance(clip, str) and clip.startswith(PROFILE)
        voices.append(Voice(profile=clip.removeprefix(PROFILE).strip()) if is_profile else Voice(as_part(clip), text or None))
    return voices


def context(text: str, voices: Sequence[Voice] = (), scene: str = "", system: Any = None) -> list[dict]:
    """The turns before `text`; see the table above.

    voices: of SPEAKER0, SPEAKER1, ...
    system: content of a system turn that replaces the official one; "" for none
    raises: DataError if `system` replaces a turn that would have held voices or a scene
    """
    are_exchanges = all(voice.clip and voice.text for voice in voices)
    exchanges = [turn for n, voice in enumerate(voices) for turn in _exchange(n, voice, len(voices))] if are_exchanges else []
    if system is not None:
        if scene or not are_exchanges:
            lost = "the scene" if are_exchanges else "reference clips without transcripts"
            raise DataError(f"a system turn of your own replaces the one that holds {lost}; give ref_text, or no system turn")
        return [{"role": "system", "content": system}, *exchanges] if system else exchanges
    if exchanges and not scene:
        return exchanges
    unknown = _unknown_voices(text)
    if voices:
        described = [] if are_exchanges else [(f"SPEAKER{n}", voice.clip or voice.profile) for n, voice in enumerate(voices)]
        return [{"role": "system", "content": _scene(INSTRUCTION, scene, described)}, *exchanges]
    if len(unknown) > 1:
        return [{"role": "system", "content": _scene(SEVERAL_SPEAKERS, scene, unknown)}]
    return [{"role": "system", "content": _scene(INSTRUCTION, scene, [])}]


def record(
    text: str,
    clip: dict,
    voices: Sequence[Voice] = (),
    scene: str = "",
    system: Any = None,
    speaker: str | None = None,
) -> dict:
    """A ChatML record in which only `clip`, the answer to `text`, trains."""
    before = context(text, voices, scene, system)
    made: dict[str, Any] = {"messages": [*before, *_turns(text, clip)]}
    if any(turn["role"] == "assistant" for turn in before):
        made["start_index"] = len(before) + 1
    return made | ({"speaker": speaker} if speaker else {})


def oddity(turns: Sequence[tuple[str, str]], text: str) -> str | None:
    """How the turns before a text differ from those that `context` can make; None if they do not.

    turns: (role, content) of each, a clip in the content as CLIP
    """
    if not turns:
        return "no system turn, where inference sends one"
    role, content = turns[0]
    if role != "system":
        return None
    instruction, _, described = content.partition("\n\n<|scene_desc_start|>\n")
    if instruction not in (INSTRUCTION, SEVERAL_SPEAKERS):
        return f"a system turn of its own, which `generate` needs too (--system): {content[:60]!r}"
    lines = described.removesuffix("\n<|scene_desc_end|>").split("\n")
    voices = [line.split(": ", 1) for line in lines if re.match(r"SPEAKER\d+: ", line)]
    scene = "\n".join(lines[: len(lines) - len(voices)]).strip("\n")
    unknown = _unknown_voices(text)
    are_unknown = len(unknown) > 1 and len(turns) == 1 and all(voice in map(list, unknown) for voice in voices)
    expected = _scene(SEVERAL_SPEAKERS, scene, unknown) if are_unknown else _scene(INSTRUCTION, scene, voices)
    at = len(os.path.commonprefix([content, expected]))
    if content == expected:
        return None
    return f"a system turn that inference writes otherwise: {content[at : at + 40]!r} where it has {expected[at : at + 40]!r}"


@dataclass(frozen=True)
class Phrasing:
    """Shares of the phrasings that inference uses. What a record gets depends on the seed and the record alone."""

    scene_share: float = 0.5  # of records that get the official default scene
    system_share: float = 0.3  # of references with transcripts that go into the system turn
    seed: int = 0

    def choose(self, record: str, voices: Sequence[Voice], scene: str) -> tuple[Sequence[Voice], str]:
        """The voices and the scene of a record, for `context`; a record's own scene stays. record: its text and clip, say"""
        if not scene and self._draw(record, "scene") < self.scene_share:
            scene = QUIET_ROOM
        if voices and self._draw(record, "system") < self.system_share:
            voices = [replace(voice, text=None) for voice in voices]
        return voices, scene

    def _draw(self, record: str, what: str) -> float:
        return zlib.crc32(f"{self.seed} {what} {record}".encode("utf-8", "surrogatepass")) / 2**32


def normalise(text: str) -> str:
    """A text as upstream's example changes it before the model sees it. Transcripts of references are not changed there.

    Full-width punctuation becomes ASCII, brackets become blanks, `[laugh]` and the like become tags such as
    `<SE>[Laughter]</SE>`, blanks are merged, empty lines go, and a text ends with punctuation.
    """
    text = text.translate(CHARACTERS)
    for before, after in WORDS.items() if "[" in text or "°" in text else ():
        text = text.replace(before, after)
    text = "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())
    return text if text.endswith(ENDS) else text + "."


def _unknown_voices(text: str) -> list[tuple[str, str]]:
    return [(tag, ("feminine", "masculine")[n % 2]) for n, tag in enumerate(sorted(set(TAG.findall(text))))]


def _turns(text: str, clip: dict) -> list[dict]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": clip}]


def _exchange(number: int, voice: Voice, num_voices: int) -> list[dict]:
    is_tagged = num_voices == 1 or TAG.match(voice.text)
    return _turns(voice.text if is_tagged else f"[SPEAKER{number}] {voice.text}", voice.clip)


def _scene(instruction: str, scene: str, described: Sequence[tuple[str, Any]]) -> str | list[dict]:
    """A system turn: text, or where clips describe speakers a list of parts. described: (speaker, profile or clip)"""
    if not scene and not described:
        return instruction
    text = f"{instruction}\n\n<|scene_desc_start|>\n{scene}" + ("\n\n" if scene and described else "")
    parts: list[dict] = []
    for number, (speaker, voice) in enumerate(described):
        text += "\n" * (number > 0) + f"{speaker}: "
        if isinstance(voice, dict):
            parts += [{"type": "text", "text": text}, voice]
            text = ""
        else:
            text += voice
    text += "\n<|scene_desc_end|>"
    return [*parts, {"type": "text", "text": text}] if parts else text


DEFAULT_SYSTEMS = [context("", scene=scene)[0]["content"] for scene in ("", QUIET_ROOM)]  # without references
