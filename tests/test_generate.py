"""generate: its codes are the official engine's; every kind of checkpoint, prompt and mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.data_types import ChatMLSample, Message
from conftest import run_ranks, write_manifest
from safetensors.torch import save_file
from test_codec import write_wav
from test_train import run_here, settings

from export import merge, read
from generate import __main__ as generate
from generate import engine
from generate.lines import Chunking, line_of_request, split_text
from generate.official import Sampling, join
from generate.scores import Score, find_runaway
from prepare import prompts
from prepare.audio import import_codec, load_codec
from tools import demo as demo_
from tools import toys as demo

CODES = ["--audio_tokenizer", "none", "--device", "cpu"]
GREEDY = ["--temperature", "0", "--ras_win_len", "0", "--max_new_tokens", "40"]


def say(folder: Path, *argv: object) -> torch.Tensor:
    """The codes of one text."""
    out = folder / "said.npy"
    out.unlink(missing_ok=True)
    assert generate.main([*map(str, argv), "--out", str(out), "--force_audio"]) == 0
    return torch.from_numpy(np.load(out))


# ---- against the official engine


def test_codes_equal_the_official_engines(loud_dir, codec_dir, tmp_path):
    """The serve engine with its static cache, and this command: the same codes, greedy and sampled, and the same wav."""
    from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine

    import_codec()  # upstream's module, importable where torchaudio is not
    engine = HiggsAudioServeEngine(
        str(loud_dir), str(codec_dir), device="cpu", torch_dtype=torch.float32, kv_cache_lengths=[128, 256]
    )
    argv = f"--ckpt {loud_dir} --device cpu --seed 3 --max_new_tokens 30 --force_audio --normalize no --text spoken --temperature"
    prompt = ChatMLSample([Message("system", prompts.INSTRUCTION), Message("user", "spoken")])
    for temperature in (0.0, 1.0):
        expected = engine.generate(prompt, 30, temperature, top_k=50, force_audio_gen=True, seed=3)
        delayed = expected.generated_audio_tokens
        undelayed = np.stack([delayed[k, k : delayed.shape[1] - 7 + k] for k in range(8)]).clip(0, 63)[:, 1:-1]
        codes = say(tmp_path, *argv.split(), temperature, *CODES)
        assert codes.shape[1] >= 10 and np.array_equal(codes, undelayed)
    out = str(tmp_path / "a.wav")
    assert generate.main([*argv.split(), "1.0", "--audio_tokenizer", str(codec_dir), "--out", out]) == 0
    samples, rate = soundfile.read(out)
    assert rate == expected.sampling_rate and samples == pytest.approx(expected.audio, abs=1 / 32768)  # 16 bit


def test_texts_are_normalised_as_the_official_example_does(tmp_path):
    """"hello" and "hello." are one text, which is what rows of a data set train; --normalize no leaves it as it is."""
    request = {"text": "hello  （you） [laugh]"}
    chunks = [line_of_request(request, "a", tmp_path, "here", Chunking(normalize=on)).chunks for on in (True, False)]
    assert chunks == [["hello you <SE>[Laughter]</SE>"], [request["text"]]]


# ---- every kind of checkpoint


def test_every_kind_of_checkpoint(toys, tmp_path, capsys):
    """An adapter changes what is said; merging it does not, nor taking it from the run's checkpoint, nor another layout."""
    run_here(settings(toys, tmp_path / "o", lora_r=8, mixed_precision="no", max_steps=3, save_steps=3))
    argv = ["--text", "hello", "--normalize", "no", *CODES, *GREEDY]
    base = say(tmp_path, "--ckpt", toys / "checkpoint", *argv)
    adapted = say(tmp_path, "--ckpt", tmp_path / "o" / "final", *argv)
    merged = say(tmp_path, "--ckpt", tmp_path / "o" / "final", "--merge_lora", *argv)
    assert torch.equal(adapted, merged) and not torch.equal(adapted, base)
    assert torch.equal(adapted, say(tmp_path, "--ckpt", tmp_path / "o" / "checkpoints" / "step_3", *argv))
    capsys.readouterr()
    assert torch.equal(adapted, say(tmp_path, "--ckpt", tmp_path / "o", *argv))
    line = f"{tmp_path / 'o'} is a run; its model is {tmp_path / 'o' / 'final'} (no step is known as the best); others, which can be"
    assert f"{line} named instead: checkpoints/step_3\n" in capsys.readouterr().err
    merge.convert(read.open_model(toys / "checkpoint"), tmp_path / "other", "transformers")
    assert torch.equal(base, say(tmp_path, "--ckpt", tmp_path / "other", *argv))
    config = json.loads((tmp_path / "o" / "final" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "o" / "final" / "adapter_config.json").write_text(json.dumps(config))
    assert generate.main(["--ckpt", str(tmp_path / "o" / "final"), *argv]) == 2, "its base is not there"
    again = say(tmp_path, "--ckpt", tmp_path / "o" / "final", "--base_ckpt", toys / "checkpoint", *argv)
    assert torch.equal(again, adapted)


# ---- every kind of prompt


def test_context_is_the_official_phrasing(tmp_path):
    """The turns before the text, for the cases of upstream's examples/generation.py."""

    def prompt(clips: list[str], texts: list[str], scene: str = "", system: str | None = None) -> list[tuple]:
        request = {"text": "text", "ref_audio": clips, "ref_text": texts, "scene": scene, "system": system}
        for clip in clips:
            np.save(tmp_path / clip, np.zeros((8, 2), np.int64))
        line = line_of_request(request, "a", tmp_path, "here", Chunking(normalize=False))
        messages = line.record([], line.chunks[0]).chatml.messages
        parts = [(m.role, m.content if isinstance(m.content, list) else [m.content]) for m in messages]
        return [(role, "".join(getattr(p, "text", "<clip>") if not isinstance(p, str) else p for p in c)) for role, c in parts]

    text = ("user", "text")
    start, end = "Generate audio following instruction.\n\n<|scene_desc_start|>\n", "\n<|scene_desc_end|>"
    assert prompt([], []) == [("system", "Generate audio following instruction."), text]
    assert prompt([], [], "Rain.") == [("system", f"{start}Rain.{end}"), text]
    assert prompt([], [], system="") == [text]
    assert prompt(["a.npy"], ["hi"]) == [("user", "hi"), ("assistant", "<clip>"), text]
    two = [("user", "[SPEAKER0] hi"), ("assistant", "<clip>"), ("user", "[SPEAKER1] ho"), ("assistant", "<clip>"), text]
    assert prompt(["a.npy", "b.npy"], ["hi", "ho"]) == two
    assert prompt(["a.npy", "b.npy"], ["hi", "ho"], "Rain.") == [("system", f"{start}Rain.{end}"), *two]
    assert prompt(["a.npy"], []) == [("system", f"{start}SPEAKER0: <clip>{end}"), text]
    in_system = f"{start}Rain.\n\nSPEAKER0: <clip>\nSPEAKER1: <clip>{end}"
    assert prompt(["a.npy", "b.npy"], [], "Rain.") == [("system", in_system), text]


def test_split_text():
    text = "One two three. Four five! Is that so? A very long sentence of just ten words goes here now."
    assert split_text(text) == [text]
    assert split_text(text, Chunking(5)) == [
        "One two three. Four five!",
        "Is that so?",
        "A very long sentence of",
        "just ten words goes here",
        "now.",
    ]
    script = "[SPEAKER0] Hello there.\n[SPEAKER1] Hi. How are you?\n[SPEAKER0] Fine."
    assert split_text(script) == [script]
    assert split_text(script, Chunking(turns=2)) == [
        "[SPEAKER0] Hello there.\n[SPEAKER1] Hi. How are you?",
        "[SPEAKER0] Fine.",
    ]
    assert split_text(script, Chunking(3)) == [
        "[SPEAKER0] Hello there.\n[SPEAKER1] Hi.",
        "[SPEAKER1] How are you?",
        "[SPEAKER0] Fine.",
    ]
    assert split_text("今天天气很好。我们去公园吧。", Chunking(7)) == ["今天天气很好。", "我们去公园吧。"]
    every = "a b  c\n\nd. e? f"
    for size in range(1, 8):
        assert "".join("".join(split_text(every, Chunking(size))).split()) == "".join(every.split())


def test_chunks_carry_their_context(loud_dir, tmp_path, monkeypatch):
    """A long text: each chunk's prompt holds the reference and the two chunks before it, text and codes."""
    reference = np.random.default_rng(0).integers(0, 64, (8, 5))
    np.save(tmp_path / "ref.npy", reference)
    prompts, answers = [], []
    original = engine.generate_many

    def spy(*args, **kwargs):
        for request, answer in original(*args, **kwargs):
            prompts.append(request.prompt)
            answers.append(answer)
            yield request, answer

    monkeypatch.setattr(engine, "generate_many", spy)
    argv = ["--ckpt", loud_dir, "--ref_audio", tmp_path / "ref.npy", "--ref_text", "me", *CODES, "--max_new_tokens", "25"]
    said = say(tmp_path, *argv, "--text", "One. Two. Three. Four.", "--chunk_words", 1)
    clips = [join(answer.codes, 8) for answer in answers]
    assert len(clips) == 4 and all(clip.shape[1] for clip in clips)
    assert torch.equal(said, torch.cat(clips, dim=1).to(said.dtype))
    tokenizer = demo.make_tokenizer()
    assert tokenizer.decode(prompts[3].input_ids).count("<|AUDIO_OUT|>") == 3  # the reference and chunks 1 and 2
    expected = torch.cat([torch.from_numpy(reference), clips[1], clips[2]], dim=1)
    assert torch.equal(prompts[3].audio_ids_concat, expected)
    assert "Two." in tokenizer.decode(prompts[3].input_ids) and "One." not in tokenizer.decode(prompts[3].input_ids)
    long = [*argv, "--text", "One. Two. Three. Four.", "--chunk_words", 1]
    alone = say(tmp_path, *long, "--chunk_context", 0)
    assert not torch.equal(said, alone) and torch.equal(prompts[-1].audio_ids_concat, torch.from_numpy(reference))

    def frames_before(*flags: object) -> list[int]:
        """Earlier frames in the last chunk's prompt, and the frames of the chunks."""
        del answers[:]
        say(tmp_path, *long, *flags)
        return [prompts[-1].audio_ids_concat.shape[1] - 5, *(join(answer.codes, 8).shape[1] for answer in answers)]

    before, *frames = frames_before("--chunk_context", "all")
    assert before == sum(frames[:3]) and tokenizer.decode(prompts[-1].input_ids).count("<|AUDIO_OUT|>") == 4
    room = sum(frames[:3]) - 1  # one frame too few for all three
    before, *frames = frames_before("--context_frames", room)
    assert before == sum(frames[1:3]) <= room < sum(frames[:3])
    assert frames_before("--context_frames", room, "--chunk_context", 1)[0] == frames[2]
    assert frames_before("--context_frames", 1)[0] == 0


def test_seeds_and_sampling(loud_dir, tmp_path):
    argv = ["--ckpt", loud_dir, *CODES, "--text", "x", "--max_new_tokens", "30"]
    one, again, other = (say(tmp_path, *argv, "--seed", seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    greedy = say(tmp_path, *argv, "--temperature", "0", "--ras_win_len", "0")
    assert torch.equal(greedy, say(tmp_path, *argv, "--top_k", "1", "--ras_win_len", "0"))
    assert Sampling(temperature=0, ras_win_len=0).arguments() == {"max_new_tokens": 2048, "seed": 0}


def test_waveforms_in_and_out(loud_dir, codec_dir, tmp_path):
    """A wav reference through the codec is the same prompt as its codes."""
    write_wav(tmp_path / "ref.wav", 0.4)
    np.save(tmp_path / "ref.npy", load_codec(str(codec_dir), "cpu").encode(str(tmp_path / "ref.wav")).numpy())
    argv = ["--ckpt", loud_dir, "--device", "cpu", *GREEDY]
    (tmp_path / "lines.jsonl").write_text('{"text": "x", "ref_audio": "ref.wav", "id": "a/b"}\n')
    out = tmp_path / "said"
    lines = [*argv, "--audio_tokenizer", codec_dir, "--force_audio", "--lines", tmp_path / "lines.jsonl", "--out", out]
    assert generate.main(list(map(str, lines))) == 0
    (result,) = (json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
    assert (result["codes"], result["wav"]) == ("a-b.npy", "a-b.wav")
    codes = np.load(out / "a-b.npy")
    assert np.array_equal(codes, say(tmp_path, *argv, "--text", "x", "--ref_audio", tmp_path / "ref.npy", *CODES))
    one = ["--audio_tokenizer", codec_dir, "--force_audio", "--text", "x", "--ref_audio", tmp_path / "ref.wav"]
    assert generate.main(list(map(str, [*argv, *one, "--ref_text", "a hum", "--out", tmp_path / "b.wav"]))) == 0
    assert soundfile.info(tmp_path / "b.wav").frames > 960
    samples, rate = soundfile.read(out / "a-b.wav")
    assert rate == 24000 and len(samples) == pytest.approx(codes.shape[1] * 960, abs=960)


# ---- many at once


def say_on(dist, argv: list[str]):
    return generate.run([*argv[:-1], f"{argv[-1]}/{dist.world_size}"])


def test_lines_and_records_over_ranks(toys, tmp_path):
    """Two ranks say what one says: records of a manifest with their scores, requests, and a prompt without an answer."""
    records = [json.loads(line) for line in (toys / "test.jsonl").read_text().splitlines()[:3]]
    question = {"messages": records[0]["messages"][:-1]}
    requests = [{"text": "hello", "seed": 5, "id": "hello"}, {"text": "a clip", "ref_audio": "clips/00000.npy"}]
    lines = write_manifest(toys / "lines.jsonl", [*records, question, *requests])
    argv = f"--ckpt {toys / 'checkpoint'} --lines {lines} {' '.join(CODES + GREEDY)} --force_audio --out {tmp_path}"
    ((results, scores),) = run_ranks(say_on, 1, argv.split())
    for shared, same_scores in run_ranks(say_on, 2, argv.split()):
        assert [r | {"seconds": 0} for r in shared] == [r | {"seconds": 0} for r in results] and same_scores == scores
    for result in results:
        assert np.array_equal(np.load(tmp_path / "1" / result["codes"]), np.load(tmp_path / "2" / result["codes"]))
    for name in ("1", "2"):
        kept = [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        assert [k | {"seconds": 0} for k in kept] == [r | {"seconds": 0} for r in results]
    assert [r["name"] for r in results] == ["00000", "00001", "00002", "00003", "hello", "00005"]
    assert np.array_equal(np.load(tmp_path / "1" / "00000.npy"), np.load(tmp_path / "1" / "00003.npy"))
    assert ["code_match" in r for r in results] == [True] * 3 + [False] * 3 and results[4]["seed"] == 5
    (kind,) = scores
    assert scores[kind].num_clips == 3


def test_score():
    target = torch.arange(12).reshape(2, 6)
    assert Score.of(target, True, target).metrics() == {
        "num_samples": 1, "stop_rate": 1.0, "duration_ratio": 1.0, "code_match": 1.0, "exact_clips": 1, "runaway_rate": 0.0,
    }  # fmt: skip
    longer = torch.cat([target, target[:, :2]], dim=1)
    assert Score.of(longer, True, target) == Score(1, 1, 0, 0, 12, 16, 8, 6)
    assert Score.of(target[:, :0], False, target) == Score(1, 0, 0, 0, 0, 12, 0, 6)
    both = Score.of(longer, True, target) + Score.of(target[:, :0], False, target)
    assert both.metrics()["duration_ratio"] == 8 / 12 and both.code_match == 12 / 28
    stuck = Score.of(target[:, :1].expand(2, 60), False, target)
    assert (both + stuck).metrics()["runaway_rate"] == 1 / 3 and str(stuck).endswith("runaways  1/1")


def test_runaways_are_found_in_the_codes():
    """A frozen frame and loops of every length, in the middle too; not pauses, not what is said twice, not noise."""
    speech, before, after = torch.randint(0, 64, (3, 8, 300), generator=torch.Generator().manual_seed(0))

    def found(*clips) -> str | None:
        return find_runaway(torch.cat(clips, dim=1))

    def cycle(length: int, frames: int) -> torch.Tensor:
        return speech[:, :length].repeat(1, frames // length + 1)[:, :frames]

    assert found(speech) is None and found(speech[:, :0]) is None and found(speech[:, :1]) is None
    pause = speech[:, :1].expand(8, 49)
    assert found(before, pause, after) is None and found(before, pause, pause[:, :1], after) == "silence"
    for length in (2, 7, 16):
        assert found(before, cycle(length, 50), after) == "loop" and found(before, cycle(length, 49), after) is None
    for length in (17, 50):
        assert found(cycle(length, 3 * length)) == "loop" and found(cycle(length, 3 * length - 1)) is None
    varied = cycle(10, 100).clone()
    varied[2:] = speech[2:, :100]
    assert found(varied) == "loop", "the fine codebooks do not count"
    varied[1] = speech[1, :100]
    assert found(varied) is None


# ---- mistakes: one clear message, exit status 2, no traceback


def test_mistakes(toys, tmp_path, capsys):
    def error(*argv: object) -> str:
        assert generate.main(["--ckpt", str(toys / "checkpoint"), *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "--top_p 2.0: must be above 0" in error("--text", "x", "--top_p", 2)
    assert "--out a.mp4: expected a file that ends with .npy, .wav, .flac, .mp3, .ogg" in error("--text", "x", "--out", "a.mp4")
    assert "--out a.mp3: expected a file that ends with .npy" in error("--text", "x", "--out", "a.mp3", *CODES)
    assert "--lines: references, scene" in error("--lines", "l", "--scene", "s")
    for flags in (["--merge_lora"], ["--base_ckpt", "b"]):
        assert f"{flags[0]}: {toys / 'checkpoint'} is a full model, not an adapter" in error("--text", "x", *flags, *CODES)
    assert "2 ref_audio but 1 ref_text" in error("--text", "x", "--ref_audio", "a", "b", "--ref_text", "t", *CODES)
    assert "text: nothing follows [SPEAKER0]" in error("--text", "[SPEAKER0]", *CODES)
    assert "text: nothing follows [SPEAKER1]" in error("--text", "[SPEAKER0] hi\n[SPEAKER1] ", *CODES)
    np.save(tmp_path / "a.npy", np.zeros((8, 4), np.int64))
    one = ("--text", "x", "--ref_audio", tmp_path / "a.npy", *CODES)
    assert "a system turn of your own replaces the one that holds reference clips" in error(*one, "--system", "s")
    assert "a system turn of your own replaces the one that holds reference clips" in error(*one, "--system", "")
    assert "a system turn of your own replaces the one that holds the scene" in error("--text", "x", "--system", "s", "--scene", "r", *CODES)
    assert "--ref_audio no.npy: no such file" in error("--text", "x", "--ref_audio", "no.npy", *CODES)
    write_wav(tmp_path / "a.wav", 0.1)
    assert "which need a codec: give --audio_tokenizer" in error("--text", "x", "--ref_audio", tmp_path / "a.wav", *CODES)
    assert "no.txt: cannot be read" in error("--text_file", tmp_path / "no.txt", *CODES)
    for line, problem in {
        '{"txt": "x"}': 'record 0 (line 1): expected {"text": ...}',
        '{"text": "x", "speed": 2}': "unknown keys ['speed']",
        '{"text": "x", "seed": -1}': "seed: expected a whole number",
        '{"text": "x", "ref_audio": 3}': "ref_audio: expected text, or a list",
        '{"messages": [{"role": "system", "content": "x"}]}': "the answer has to follow a user turn",
        '{"messages": 3}': "messages: expected a non-empty list",
        '{"text": "x", "id": "a"}\n{"text": "y", "id": "a"}': "several lines are called a",
    }.items():
        (tmp_path / "l.jsonl").write_text(line)
        assert problem in error("--lines", tmp_path / "l.jsonl", *CODES)
    assert "no config.json" in error("--ckpt", tmp_path, "--text", "x", *CODES)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gone"}))
    factor = "base_model.model.layers.0.self_attn.q_proj.lora_"
    weights = {f"{factor}A.weight": torch.zeros(8, 128), f"{factor}B.weight": torch.zeros(128, 8)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    assert "checkpoint gone: neither a folder" in error("--ckpt", tmp_path, "--text", "x", *CODES)
    bare = shutil.copytree(toys / "checkpoint", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no *.safetensors" in error("--ckpt", bare, "--text", "x", *CODES)


def test_a_silent_model_is_reported(toys, tmp_path, capsys):
    """An untrained model that writes text instead: no file, and an exit status that says so."""
    argv = ["--ckpt", str(toys / "checkpoint"), "--text", "x", *CODES, "--temperature", "0", "--max_new_tokens", "3"]
    assert generate.main([*argv, "--out", str(tmp_path / "a.npy")]) == 1
    assert "nothing was generated" in capsys.readouterr().err and not (tmp_path / "a.npy").exists()


def test_what_was_written_is_said(loud_dir, tmp_path, capsys):
    """The file, seconds of speech at 25 frames per second, and which lines were cut off."""
    argv = ["--ckpt", str(loud_dir), *CODES, *GREEDY, "--force_audio"]
    out = tmp_path / "a.npy"
    assert generate.main([*argv, "--text", "hello", "--out", str(out)]) == 0
    seconds = np.load(out).shape[1] / 25
    assert f"wrote {out}: {seconds:.1f} s of speech in " in capsys.readouterr().out
    lines = write_manifest(tmp_path / "l.jsonl", [{"text": "hello"}, {"text": "x", "id": "x"}])
    assert generate.main([*argv, "--max_new_tokens", "12", "--lines", str(lines), "--out", str(tmp_path / "o")]) == 0
    output = capsys.readouterr().out
    frames = [np.load(tmp_path / "o" / name).shape[1] for name in ("00000.npy", "x.npy")]
    assert f"wrote 2 clips to {tmp_path / 'o'}: {sum(frames) / 25:.1f} s of speech" in output
    assert "2 of 2 did not end by themselves: 00000, x; see --max_new_tokens" in output


def test_models_with_whisper_are_refused(toys, tmp_path, capsys):
    demo.make_checkpoint(tmp_path / "w", encode_whisper_embed=True)
    assert generate.main(["--ckpt", str(tmp_path / "w"), "--text", "x", *CODES]) == 2
    assert "reads reference audio through Whisper (encode_whisper_embed)" in capsys.readouterr().err


def test_the_demo_repeats_by_the_official_call(toys, loud_dir, tmp_path, monkeypatch):
    """Records of each kind are equal; a clip with another code is named."""
    monkeypatch.setattr(demo_, "AGAIN", 2)
    generated = tmp_path / "generated"
    demo_.evaluate(loud_dir, toys / "test.jsonl", generated)
    assert demo_.differing(loud_dir, toys / "test.jsonl", generated, tmp_path / "official") == []
    assert len(list((tmp_path / "official").glob("*.npy"))) == 5 * demo_.AGAIN
    longest = max(generated.glob("0000[01].npy"), key=lambda path: path.stat().st_size)
    codes = np.load(longest)
    np.save(longest, np.concatenate([codes, codes[:, -1:]], axis=1) if codes.size else np.ones((8, 1), np.int16))
    assert demo_.differing(loud_dir, toys / "test.jsonl", generated, tmp_path / "again") == [longest.name]
