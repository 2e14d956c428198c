"""prompts.py phrases requests and texts as upstream's examples/generation.py does; what that gave is in golden/official.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import DataError
from data import ChatMLDataset
from generate.lines import Chunking, line_of_request
from generate.official import as_prompt, official_collator
from prepare import prompts
from prepare.audio import AudioStore
from prepare.forms import open_manifest
from prepare.prompts import Phrasing, Voice
from prepare.rows import Reading

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


def oddity(text: str, *turns: dict) -> str | None:
    contents = [turn["content"] if isinstance(turn["content"], list) else [turn["content"]] for turn in turns]
    texts = ["".join(p if isinstance(p, str) else p.get("text", prompts.CLIP) for p in content) for content in contents]
    return prompts.oddity([(turn["role"], text) for turn, text in zip(turns, texts)], text)


def test_what_differs_from_the_official_phrasing_is_found():
    for request in OFFICIAL["requests"]:
        turns = prompts.context(request["text"], voices_of(request), request["scene"] or "")
        assert oddity(request["text"], *turns) is None
    (system,) = prompts.context("x", [Voice(CLIP)], scene="A street.")
    part, *rest = system["content"]
    wrong = part | {"text": part["text"].replace("A street.\n\n", "A street.\n")}
    assert "'SPEAKER0: " in oddity("x", {"role": "system", "content": [wrong, *rest]})
    assert oddity("x") == "no system turn, where inference sends one"
    assert "--system" in oddity("x", {"role": "system", "content": "Speak."})
    several = "[SPEAKER0] Hello. [SPEAKER1] Bye."
    assert "inference writes otherwise" in oddity(several, *prompts.context("Hello."))
    assert "inference writes otherwise" in oddity("Hello.", *prompts.context(several))


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


@pytest.mark.parametrize("request_", OFFICIAL["requests"], ids=lambda r: f"{r['voices']}-{r['in_system']}-{r['scene']}")
def test_training_and_generation_ask_with_the_same_tokens(request_, tmp_path, config, tokenizer):
    """A row as training reads it and the same as a line of `generate`, up to the answer: tokens, and what the official
    collator makes of the reference clips."""
    names = (request_["voices"] or "").split(",") if request_["voices"] else []
    for number, name in enumerate(name for name in ["target", *names] if ":" not in name):
        np.save(tmp_path / f"{name}.npy", np.full((8, 5 + number), number, np.int16))
    clips = ["profile: Male, an old voice." if ":" in name else f"{name}.npy" for name in names]
    asked = {"text": request_["text"], "ref_audio": clips, "scene": request_["scene"]}
    asked |= {} if request_["in_system"] or "profile: " in str(clips) else {"ref_text": [f"This is {name}." for name in names]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(asked | {"audio": "target.npy"}) + "\n")
    line = line_of_request(asked, "0", tmp_path, "line 0", Chunking())

    store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, 25.0, tmp_path / "codes")
    plain = Reading(phrasing=Phrasing(scene_share=0, system_share=0))
    trained = ChatMLDataset(open_manifest(path, reading=plain)[0], tokenizer, store)[0]
    prompt = as_prompt(ChatMLDataset([line.record([], line.chunks[0])], tokenizer, store)[0], tokenizer)
    count = len(prompt.input_ids)
    assert torch.equal(trained.input_ids[:count], prompt.input_ids)
    assert tokenizer.decode(trained.input_ids[count:]) == "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    ours, theirs = (official_collator(config)([sample]) for sample in (trained, prompt))
    for name in ("audio_in_ids", "audio_out_ids"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        num_columns = 0 if other is None else other.shape[1]
        assert not num_columns or torch.equal(mine[:, :num_columns], other)
