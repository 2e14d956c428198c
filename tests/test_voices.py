"""generate as upstream's example is used: named voices, profiles, scenes, chunks, takes, retries, files, Ctrl-C."""

from __future__ import annotations

import io
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_sample, write_manifest
from test_codec import write_wav
from test_generation import overfit

from common import UserError
from generate import __main__ as generate
from generate import engine
from generate.files import read_results, write_clip
from tools import toys as demo

CODES = ["--audio_tokenizer", "none", "--device", "cpu"]
START, END = "Generate audio following instruction.\n\n<|scene_desc_start|>\n", "\n<|scene_desc_end|>"
PROFILES = "profiles:\n  male_en: A man with a low voice.\n  old: An old woman.\n"


@pytest.fixture()
def desk(tmp_path, monkeypatch) -> Path:
    """The folder a user is in: voices/ with two voices and a file of profiles, and clips beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voices").mkdir()
    for number, name in enumerate(("voices/belinda", "voices/chadwick", "mine", "bare")):
        np.save(f"{name}.npy", np.full((8, 3 + number), number))
        if name != "bare":
            Path(f"{name}.txt").write_text(f"I am {Path(name).name}.\n")
    Path("voices/profile.yaml").write_text(PROFILES)
    return tmp_path


def asked(*argv: object) -> list[tuple[str, str]]:
    """(role, text) of the turns before the text, where a clip is <its name>."""
    (line,) = generate.lines_of(generate.parse_args(["--ckpt", "x", "--text", "Hi.", *map(str, argv), *CODES]))
    record = line.record([], line.chunks[0])
    clips = iter(part.path.stem for part in record.audio)
    turns = [(turn.role, turn.content if isinstance(turn.content, list) else [turn.content]) for turn in record.chatml.messages]
    texts = [(role, "".join(p if isinstance(p, str) else getattr(p, "text", None) or f"<{next(clips)}>" for p in parts)) for role, parts in turns]
    assert texts[-1] == ("user", "Hi.")
    return texts[:-1]


# ---- voices


def test_named_voices(desk):
    """By name from voices/, from a folder of one's own, by path; their transcripts are the .txt files beside them."""
    two = [
        ("user", "[SPEAKER0] I am belinda."),
        ("assistant", "<belinda>"),
        ("user", "[SPEAKER1] I am chadwick."),
        ("assistant", "<chadwick>"),
    ]
    for names in (["belinda,chadwick"], ["belinda, chadwick"], ["belinda", "chadwick"], ["voices/belinda.npy", "chadwick"]):
        assert asked("--ref_audio", *names) == two
    mine = [("user", "I am mine."), ("assistant", "<mine>")]
    assert asked("--ref_audio", "mine.npy") == asked("--voices", ".", "--ref_audio", "mine") == mine
    Path("below").mkdir()
    assert asked("--ref_audio", "below/../mine.npy") == asked("--ref_audio", desk / "mine.npy") == mine
    assert asked("--ref_audio", "bare.npy") == [("system", f"{START}SPEAKER0: <bare>{END}")]


def test_an_existing_file_wins_over_a_list(desk):
    np.save("belinda,chadwick.npy", np.zeros((8, 2)))
    assert asked("--ref_audio", "belinda,chadwick.npy") == [("system", f"{START}SPEAKER0: <belinda,chadwick>{END}")]


def test_transcripts(desk):
    Path("said.txt").write_text(" What I said. \n")
    for text in ("said.txt", "What I said."):
        assert asked("--ref_audio", "mine.npy", "--ref_text", text) == [("user", "What I said."), ("assistant", "<mine>")]
    in_system = [("system", f"{START}SPEAKER0: <belinda>\nSPEAKER1: <mine>{END}")]
    assert asked("--ref_audio", "belinda", "mine.npy", "--ref_in_system") == in_system


def test_profiles_and_scenes(desk):
    """A profile by its name or in words; with one, clips go into the system turn too, as upstream has it."""
    named = [("system", f"{START}SPEAKER0: A man with a low voice.\nSPEAKER1: <belinda>{END}")]
    assert asked("--ref_audio", "profile:male_en,belinda") == named
    words = [("system", f"{START}SPEAKER0: A deep, calm voice\nSPEAKER1: An old woman.{END}")]
    assert asked("--ref_audio", "profile:A deep, calm voice,profile:old") == words
    Path("scene.txt").write_text("Rain.\n")
    for scene in ("scene.txt", "Rain."):
        assert asked("--scene", scene) == [("system", f"{START}Rain.{END}")]


def test_lines_name_voices_too(desk):
    path = write_manifest(desk / "l.jsonl", [{"text": "Hi.", "ref_audio": "belinda,bare.npy", "ref_in_system": True, "scene": "Rain."}])
    (line,) = generate.lines_of(generate.parse_args(["--ckpt", "x", "--lines", str(path), *CODES]))
    assert [part.path.name for part in line.record([], "Hi.").audio] == ["belinda.npy", "bare.npy"]
    assert line.turns[0]["content"][0]["text"] == f"{START}Rain.\n\nSPEAKER0: "


def test_mistakes_with_voices(desk):
    def error(*argv: object) -> str:
        with pytest.raises(UserError) as caught:
            asked(*argv)
        return str(caught.value)

    assert "belind: neither a file nor a voice of voices/, which has belinda, chadwick" in error("--ref_audio", "belind")
    assert "--ref_audio gone.npy: no such file" in error("--ref_audio", "gone.npy")
    assert "profile:male: voices/profile.yaml has male_en, old" in error("--ref_audio", "profile:male")
    assert "bare.txt does not exist, but the other voice has a transcript" in error("--ref_audio", "belinda", "bare.npy")
    assert "ref_text no.txt: no such file" in error("--ref_audio", "belinda", "--ref_text", "no.txt")
    assert "scene no.txt: no such file" in error("--scene", "no.txt")
    assert "ref_text: with ref_in_system" in error("--ref_audio", "belinda", "--ref_text", "a", "--ref_in_system")
    assert "ref_text: with a written profile" in error("--ref_audio", "profile:old", "--ref_text", "a")
    assert "2 ref_audio but 1 ref_text" in error("--ref_audio", "belinda,chadwick", "--ref_text", "a")
    assert "there is no ref_audio" in error("--ref_in_system")
    assert "ref_text: there is no ref_audio" in error("--ref_text", "a")
    records = write_manifest(desk / "r.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UserError, match=r"--chunk_words: .*r.jsonl holds only ChatML records"):
        generate.lines_of(generate.parse_args(["--ckpt", "x", "--lines", str(records), "--chunk_words", "3", *CODES]))
    assert "replaces the one that holds reference clips" in error("--ref_audio", "belinda", "--ref_in_system", "--system", "s")
    Path("voices/profile.yaml").write_text("male: x")
    assert "expected `profiles:`" in error("--ref_audio", "profile:male")
    Path("mine.txt").write_text(" ")
    assert "the file is empty" in error("--ref_audio", "mine.npy")


def test_arguments_that_would_be_ignored(desk):
    def error(*argv: object) -> str:
        with pytest.raises(UserError) as caught:
            generate.parse_args(["--ckpt", "x", *map(str, argv), *CODES])
        return str(caught.value)

    text = ("--text", "x")
    greedy = (*text, "--temperature", 0, "--ras_win_len", 0)
    assert "--voices: there is no --ref_audio" in error(*text, "--voices", "v")
    assert "--chunk_words: --chunk_method speaker" in error(*text, "--chunk_method", "speaker", "--chunk_words", 9)
    assert "--chunk_turns: --chunk_method word" in error(*text, "--chunk_method", "word", "--chunk_turns", 2)
    assert "needs at least 1" in error(*text, "--chunk_method", "speaker", "--chunk_turns", 0)
    assert "needs at least 1" in error(*text, "--chunk_method", "word", "--chunk_words", 0)
    assert "--chunk_context: --chunk_words 0 leaves texts whole" in error(*text, "--chunk_words", 0, "--chunk_context", "all")
    assert "--context_frames: --chunk_context 0" in error(*text, "--chunk_context", 0, "--context_frames", 50)
    assert "--top_k: --temperature 0" in error(*text, "--temperature", 0, "--top_k", 5)
    assert "--ras_win_max_num_repeat: --ras_win_len 0" in error(*text, "--ras_win_len", 0, "--ras_win_max_num_repeat", 3)
    assert "--takes: without sampling" in error(*greedy, "--takes", 2)
    assert "--retries: without sampling" in error(*greedy, "--retries", 2)
    assert "--takes 0: must be at least 1" in error(*text, "--takes", 0)
    for flag, value, must in (("temperature", "nan", "0 or more"), ("temperature", "inf", "below"), ("seed", 2**63, "below"), ("top_k", -1, "0 or")):
        assert f"--{flag} {value}: must be {must}" in error(*text, f"--{flag}", value)
    assert "--text: is empty" in error("--text", " ")
    assert "unknown argument --retires; did you mean --retries?" in error(*text, "--retires", 3)
    assert "--out a.wav: --lines needs a folder" in error("--lines", "l", "--out", "a.wav")
    Path("file").write_text("")
    assert "file is a file, not a folder" in error(*text, "--out", "file/a.npy")
    assert "--lines: references" in error("--lines", "l", "--ref_in_system")
    assert "--compile: --official is not compiled" in error(*text, "--official", "--compile")
    assert "--compile: does not go with --quantize nf4" in error(*text, "--quantize", "nf4", "--compile")
    assert "--force: without --out" in error(*text, "--force")
    both = error(*text, "--takes", 0, "--top_p", 2)
    assert "--takes 0" in both and "--top_p 2.0" in both, "all problems at once"


# ---- chunks


def test_chunk_method(desk):
    script = "[SPEAKER0] One. Two.\n[SPEAKER1] Three.\nFour.\n[SPEAKER0] Five."

    def chunks(*argv: object) -> list[str]:
        (line,) = generate.lines_of(generate.parse_args(["--ckpt", "x", "--text", script, *map(str, argv), *CODES]))
        return line.chunks

    turns = ["[SPEAKER0] One. Two.", "[SPEAKER1] Three.\nFour.", "[SPEAKER0] Five."]
    assert chunks() == [script] and chunks("--chunk_method", "speaker") == turns
    assert chunks("--chunk_method", "speaker", "--chunk_turns", 2) == ["\n".join(turns[:2]), turns[2]]
    assert chunks("--chunk_method", "word", "--chunk_words", 3) == ["[SPEAKER0] One. Two.\n[SPEAKER1] Three.", "[SPEAKER1] Four.\n[SPEAKER0] Five."]


# ---- what is written


@pytest.fixture(scope="module")
def looping_dir(tmp_path_factory, tokenizer) -> Path:
    """A model trained on two answers to one prompt: a clip, and the same that never gets past its last frame."""
    folder = tmp_path_factory.mktemp("looping")
    right, stuck = (make_sample(tokenizer, ("user", "say it"), ("assistant", 9)) for _ in range(2))
    np.save(folder / "right.npy", right.audio_ids_concat)
    stuck.audio_ids_concat = torch.cat([right.audio_ids_concat, right.audio_ids_concat[:, -1:].expand(8, 60)], dim=1)
    model, *_ = overfit(demo.tiny_config(tokenizer), [right, stuck], unshifted=False, steps=45)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def speak(model: Path, *argv: object) -> int:
    return generate.main(["--ckpt", str(model), "--device", "cpu", "--max_new_tokens", "30", "--force_audio", *map(str, argv)])


def test_takes_numbers_and_force(desk, loud_dir, capsys):
    """Takes are what the next seeds give; a default name is the next free one; a given one is not overwritten by chance."""
    hi = ["--text", "x", *CODES[:2]]
    assert speak(loud_dir, *hi, "--takes", 2, "--seed", 1, "--out", "a.npy") == 0
    assert "wrote a-1.npy, a-2.npy: " in capsys.readouterr().out
    for seed, name in ((1, "speech"), (2, "speech-2")):
        assert speak(loud_dir, *hi, "--seed", seed) == 0
        output = capsys.readouterr().out
        assert f"wrote {name}.npy: " in output and " times real time" in output
        assert np.array_equal(np.load(f"{name}.npy"), np.load(f"a-{seed}.npy"))
    first, other = Path("speech.npy").read_bytes(), Path("speech-2.npy").read_bytes()
    assert speak(loud_dir, *hi, "--seed", 2, "--out", "speech.npy") == 2
    assert "--out speech.npy: is there already" in capsys.readouterr().err and Path("speech.npy").read_bytes() == first
    assert speak(loud_dir, *hi, "--seed", 2, "--out", "speech.npy", "--force") == 0
    assert Path("speech.npy").read_bytes() == other
    lines = write_manifest(desk / "l.jsonl", [{"text": "x", "seed": 1, "id": "hi"}])
    assert [speak(loud_dir, "--lines", lines, "--takes", 2, *CODES[:2]) for _ in range(2)] == [0, 0]
    for folder in ("generated", "generated-2"):
        assert [result["name"] for result in read_results(Path(folder))] == ["hi-1", "hi-2"]
        assert np.array_equal(np.load(f"{folder}/hi-2.npy"), np.load("a-2.npy"))
    assert speak(loud_dir, "--lines", lines, "--out", "generated", *CODES[:2]) == 2


def test_retries(desk, looping_dir, capsys):
    """A trained model, half of whose answers get stuck: more stop, and in time; those that did at once are the same."""
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": {"type": "audio", "audio_url": "right.npy"}}]
    lines = write_manifest(looping_dir / "l.jsonl", [{"messages": turns}])
    argv = ["--ckpt", looping_dir, "--lines", lines, "--takes", 16, "--max_new_tokens", 80, *CODES]
    runs, correct = {}, {}
    for retries in (0, 5):
        assert generate.main([str(word) for word in (*argv, "--retries", retries, "--out", retries)]) == 0
        runs[retries] = read_results(Path(str(retries)))
        correct[retries] = int(re.search(r"correct stops +(\d+)/16", capsys.readouterr().out)[1])
    stuck = {retries: sum(result["runaway"] is not None for result in results) for retries, results in runs.items()}
    assert 0 < correct[0] < correct[5] and 0 <= stuck[5] < stuck[0]
    print(f"correct stops without and with retries: {correct}, stuck: {stuck}")
    for before, after in zip(runs[0], runs[5]):
        was_good, is_good = (each["stopped"] and each["frames"] > 0 and not each["runaway"] for each in (before, after))
        assert not was_good or np.array_equal(np.load(f"0/{before['codes']}"), np.load(f"5/{after['codes']}"))
        assert (after["retries"] == 0) == was_good and (is_good or after["retries"] == 5)


def test_formats(desk, loud_dir, codec_dir, capsys):
    """A wav reference in, each format out, by the real codec; and two minutes in each format."""
    write_wav(desk / "voices" / "anna.wav", 0.4)
    argv = ["--text", "x", "--ref_audio", "anna", "--voices", desk / "voices", "--audio_tokenizer", codec_dir, "--seed", 1]
    out = desk / "a.flac"  # the codec's files make another folder the current one
    assert speak(loud_dir, *argv, "--out", out) == 0
    seconds = soundfile.info(out).duration
    assert f"wrote {out}: {seconds:.1f} s of speech" in capsys.readouterr().out and seconds > 0.1
    for suffix in ("wav", "flac", "mp3", "ogg"):
        write_clip(desk / f"long.{suffix}", torch.zeros((8, 1)), Hum())
        info = soundfile.info(desk / f"long.{suffix}")
        assert info.format == suffix.upper() and info.duration == pytest.approx(Hum.SEC, abs=0.2)


class Hum:
    """In a codec's place: a sound so long that libsndfile could not write it as Ogg at once."""

    SEC, sampling_rate = 120, 24000

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        return 0.1 * np.random.default_rng(0).standard_normal((1, 1, self.SEC * self.sampling_rate), np.float32)


def interrupt_after(count: int, monkeypatch) -> None:
    """Ctrl-C once so many answers are there."""
    original = engine.generate_many

    def pressed(*args, **kwargs):
        for number, pair in enumerate(original(*args, **kwargs), start=1):
            yield pair
            if number == count:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(engine, "generate_many", pressed)


def test_ctrl_c_keeps_what_is_done(desk, loud_dir, capsys, monkeypatch):
    """Lines that are done, with their results; of a long text, the chunks that are done."""
    lines = write_manifest(desk / "l.jsonl", [{"text": "Hi.", "id": name} for name in "abcd"])
    interrupt_after(3, monkeypatch)
    assert speak(loud_dir, "--lines", lines, "--batch_size", 1, "--out", "o", *CODES[:2]) == 130
    assert [result["name"] for result in read_results(Path("o"))] == ["a", "b", "c"] and len(list(Path("o").glob("*.npy"))) == 3
    captured = capsys.readouterr()
    assert "interrupted: 3 of 4 are done" in captured.err and "wrote 3 clips to o" in captured.out
    text = ["--text", "One. Two. Three. Four.", "--chunk_words", 1, *CODES[:2]]
    assert speak(loud_dir, *text, "--out", "part.npy") == 130
    captured = capsys.readouterr()
    assert "interrupted: 0 of 1 are done" in captured.err and "wrote part.npy" in captured.out
    monkeypatch.undo()
    monkeypatch.chdir(desk)
    assert speak(loud_dir, *text, "--out", "whole.npy") == 0
    part, whole = np.load("part.npy"), np.load("whole.npy")
    assert 0 < part.shape[1] < whole.shape[1] and np.array_equal(part, whole[:, : part.shape[1]])


def test_an_error_is_no_interruption(desk, loud_dir, capsys):
    np.save("few.npy", np.zeros((3, 4), np.int64))
    assert speak(loud_dir, "--text", "x", "--ref_audio", "few.npy", *CODES[:2]) == 2
    error = capsys.readouterr().err
    assert "few.npy" in error and "interrupted" not in error


def test_progress_bar(desk, loud_dir, monkeypatch):
    """On a terminal: chunks of all, and seconds of speech so far; none in a file."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert speak(loud_dir, "--text", "One. Two.", "--chunk_words", 1, *CODES[:2]) == 0
        bar = stream.getvalue()
        assert ("2/2" in bar and "s of speech" in bar) == stream.isatty() and bool(bar) == stream.isatty()
