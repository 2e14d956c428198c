"""prompts.py phrases requests and texts as upstream's examples/generation.py does; what that gave is in golden/official.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common import DataError
from prepare import prompts
from prepare.prompts import Voice

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "official.json").read_text(encoding="utf-8"))
CLIP = {"type": "audio", "audio_url": "a.wav"}


def voices_of(request: dict) -> list[Voice]:
    voices = []
    for name in filter(None, (request["voices"] or "").split(",")):
        if name.startswith("profile:"):
            voices.append(Voice(profile="Male, an old voice."))
        else:
            clip = {"type": "audio", "audio_url": f"{name}.wav"}
            voices.append(Voice(clip, None if request["in_system"] else f"This is {name}."))
    return voices


def flat(turns: list[dict]) -> list[list]:
    """[role, texts and, for clips, None] of each turn."""
    parts = [[turn["content"]] if isinstance(turn["content"], str | dict) else turn["content"] for turn in turns]
    return [
        [turn["role"], [part if isinstance(part, str) else part.get("text") for part in content]]
        for turn, content in zip(turns, parts)
    ]


@pytest.mark.parametrize("request_", OFFICIAL["requests"], ids=lambda r: f"{r['voices']}-{r['in_system']}-{r['scene']}")
def test_requests_are_phrased_as_the_official_example_does(request_):
    voices = voices_of(request_)
    turns = prompts.context(request_["text"], voices, request_["scene"] or "")
    assert flat(turns) == request_["turns"]
    clips = [part for turn in turns for part in turn["content"] if isinstance(part, dict) and part["type"] == "audio"]
    clips += [turn["content"] for turn in turns if isinstance(turn["content"], dict)]
    assert clips == [voice.clip for voice in voices if voice.clip]

    made = prompts.record(request_["text"], CLIP, voices, request_["scene"] or "", speaker="anna")
    assert made["messages"] == [
        *turns,
        {"role": "user", "content": request_["text"]},
        {"role": "assistant", "content": CLIP},
    ]
    trained = [turn for turn in made["messages"][made.get("start_index", 0) :] if turn["role"] == "assistant"]
    assert trained == made["messages"][-1:] and made["speaker"] == "anna"


@pytest.mark.parametrize(("text", "expected"), OFFICIAL["texts"])
def test_texts_are_normalised_as_the_official_example_does(text, expected):
    assert prompts.normalise(text) == expected
    assert prompts.normalise(expected) == expected or "(" in text or "【" in text, "a second time changes nothing"


def test_a_transcript_that_is_tagged_already_is_not_tagged_again():
    turns = prompts.context("x", [Voice(CLIP, "[SPEAKER0] Hello"), Voice(CLIP, "Bye")])
    assert [turn["content"] for turn in turns[::2]] == ["[SPEAKER0] Hello", "[SPEAKER1] Bye"]


def test_a_system_turn_of_ones_own_loses_nothing_silently():
    own = {"role": "system", "content": "Speak slowly."}
    assert prompts.context("x", system="Speak slowly.") == [own]
    assert prompts.context("x", [Voice(CLIP, "Hello")], system="Speak slowly.")[0] == own
    assert prompts.context("x", system="") == []
    with pytest.raises(DataError, match="replaces the one that holds reference clips without transcripts; give ref_text"):
        prompts.context("x", [Voice(CLIP)], system="Speak slowly.")
    with pytest.raises(DataError, match="replaces the one that holds the scene"):
        prompts.context("x", scene="A quiet room.", system="Speak slowly.")
