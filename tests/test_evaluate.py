"""`bash launch.sh evaluate`: the published protocol, comparisons, and what is missing; sampling and drift while training."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_ranks
from test_codec import write_wav

pytest.importorskip("zhon", reason="needs requirements-evaluate.txt")

from common import ConfigError, DataError
from generate import evaluate
from generate.evaluate import MEASURES, Measure, compare, find_worse, render_text, table
from generate.files import write_results
from generate.judges import SpeakerSimilarity, Transcriber
from generate.page import short_names
from generate.seedtts import Errors, normalise, read_meta
from prepare.manifest import read_manifest

# ---- the protocol

# (text, transcript, word error rate) by process_one of BytedanceSpeech/seed-tts-eval@752f429, run_wer.py
PUBLISHED = (
    ("Hello, world!", "hello world", 0.0),
    ("I don't know — it's 5 o'clock.", "I don’t know its five oclock", 0.666667),
    ("“Quoted”  text…  and (brackets) [too]", "quoted text and brackets too", 0.0),
    ("well-known e-mail", "well known email", 1.0),
    ("A  B   C    D", "a b c d", 0.0),
    (" leading and trailing ", "leading and trailing", 0.0),
    ("naïve café №5 £3 50%", "naive cafe no5 3 50", 0.8),
    ("Dr. Smith's U.S. visit, e.g. Jan. 3rd", "doctor smith's us visit eg jan third", 0.285714),
    ("under_score and slash/slash", "underscore and slash slash", 0.666667),
    ("rock 'n' roll", "rock and roll", 0.333333),
    ("a、b。c；d：e？", "a b c d e", 5.0),
    ("tab\tand\nnewline", "tab and newline", 3.0),
    ("ÀÉ STRASSE ß", "àé straße ss", 0.666667),
    ("one two three", "", 1.0),
    ("full．width\u3000space", "fullwidth space", 2.0),
    ("～tilde~ <tag> {x} |pipe| ^hat`", "tilde tag x pipe hat", 0.0),
    ("5,000.50", "5000 50", 2.0),
)
PUBLISHED_ZH = (
    ("今天，天气很好。", "今天天气很好", 0.0),
    ("我有 3 个苹果！", "我有三个苹果", 0.166667),
    ("“你好”——他说", "你好他说", 0.0),
    ("OK，再见", "ok再见", 0.5),
)


@pytest.mark.parametrize("language, pairs", [("en", PUBLISHED), ("zh", PUBLISHED_ZH)])
def test_word_errors_are_those_of_seed_tts_eval(language, pairs):
    if language == "zh":
        pytest.importorskip("zhconv", reason="needs requirements-evaluate.txt")
    for text, transcript, wer in pairs:
        errors = Errors.of(transcript, text, language)
        assert errors.word_errors / errors.words == pytest.approx(wer, abs=1e-6), text


def test_errors_are_counted():
    assert Errors.of("the cat sad", "The cat sat.", "en") == Errors(1, 3, 1, 11)
    assert Errors.of("", "a b", "en") == Errors(2, 2, 3, 3)
    assert normalise("It's “Ä”…", "en") == "it's ä"
    with pytest.raises(ValueError, match="no words"):
        Errors.of("x", "…!", "en")


def test_meta_lst(tmp_path):
    path = tmp_path / "meta.lst"
    path.write_text("a-1|Said before.|wavs/a.wav|Say this.|wavs/b.wav\n\nb|Was|/x.wav|Is\n", encoding="utf-8")
    first, second = read_meta(path)
    assert first == {"id": "a-1", "ref_text": "Said before.", "ref_audio": str(tmp_path / "wavs/a.wav"), "text": "Say this."}
    assert second["ref_audio"] == "/x.wav"
    path.write_text("a|b|c.wav\n")
    with pytest.raises(DataError, match="meta.lst line 1: expected utt|prompt_text"):
        read_meta(path)


def weights_by_name(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights for which the golden embeddings were computed."""
    weights = {}
    for name, shape in shapes.items():
        values = torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        positive = name.endswith(("running_var", "weight_g", "grep_a"))
        weights[name] = values + 0.5 if positive else (values - 0.5) * 4 / max(1, values[0].numel()) ** 0.5
    return weights


def test_wavlm_with_ecapa_head(tmp_path):
    """A file as published, but tiny: the embeddings are upstream's (measured: equal to the bit), the pickle is not run."""
    golden = json.loads((ROOT / "tests/golden/ecapa.json").read_text())
    state = weights_by_name(golden["shapes"])
    torch.save({"model": state | {"loss_calculator.weight": torch.zeros(3)}}, tmp_path / "tiny.pth")
    similarity = SpeakerSimilarity(str(tmp_path / "tiny.pth"), torch.device("cpu"))
    clips = torch.rand(2, 16000, generator=torch.Generator().manual_seed(0)) - 0.5
    embeddings = torch.stack([similarity.embed(clip.numpy(), 16000) for clip in clips])
    torch.testing.assert_close(embeddings, torch.tensor(golden["embeddings"]), rtol=1e-5, atol=1e-5)
    assert similarity(clips[0].numpy(), clips[0].numpy(), 16000) == pytest.approx(1, abs=1e-6)
    del state["layer3.SE_Connect.linear2.bias"]
    for content, problem in (({"model": state}, "1 of its weights are missing"), (ROOT, "Weights only load failed")):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ConfigError, match=problem):
            SpeakerSimilarity(str(tmp_path / "bad.pth"), torch.device("cpu"))


def test_whisper_is_told_the_language_and_hears_long_clips(whisper_dir):
    """As Seed-TTS-eval asks it to transcribe; by itself the pipeline guesses the language and refuses clips above 30 s."""
    clip = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    for language, tag in (("english", "<|en|>"), ("chinese", "<|zh|>")):
        transcriber = Transcriber(str(whisper_dir), torch.device("cpu"), language)
        recogniser, prompts = transcriber.pipeline, []
        forward = recogniser.model.forward

        def spy(*args, forward=forward, prompts=prompts, **kwargs):
            prompts.append(kwargs["decoder_input_ids"][0].tolist())
            return forward(*args, **kwargs)

        recogniser.model.forward = spy
        assert isinstance(transcriber(clip, 16000), str)
        assert recogniser.tokenizer.convert_ids_to_tokens(prompts[0]) == ["<|startoftranscript|>", tag, "<|transcribe|>"]
    assert isinstance(transcriber(np.tile(clip, 31), 16000), str)


# ---- figures


def takes_with(**columns) -> list[dict]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def test_figures_and_their_intervals():
    takes = takes_with(wer=[0.0, 1.0, 0.5], word_errors=[0, 4, 1], words=[10, 4, 2], stopped=[True, False, True])
    alone = compare([takes], [0.5])
    assert alone["wer_seedtts"].value == 0.5 and alone["wer_pooled"].value == 5 / 16
    assert alone["stop_rate"].value == 2 / 3 and alone["rtf"].value == 0.5 and "sim_o" not in alone
    same = compare([takes, takes], [0.5, 0.25])["wer_seedtts"]
    assert (same.difference, same.low, same.high) == (0, 0, 0)

    # The interval against one from the normal approximation of the mean difference.
    draw = np.random.default_rng(1)
    first, second = draw.normal(0.5, 0.1, (2, 400))
    second += first - 0.52
    figure = compare([takes_with(sim_o=each) for each in (first, second)], [None, None])["sim_o"]
    half = 1.96 * np.std(first - second) / 20
    assert figure.difference == pytest.approx(np.mean(first - second))
    assert (figure.high - figure.low) / 2 == pytest.approx(half, rel=0.1) and figure.low < figure.difference < figure.high

    rows = table({"sim_o": figure, "wer_seedtts": same}, ["a", "b"])
    assert [row[0] for row in rows] == ["", "wer_seedtts", "sim_o"] and rows[2][-1] == "better" and rows[1][-1] == ""
    assert render_text(rows).splitlines()[1].split() == ["wer_seedtts", "50.00", "%", "50.00", "%", "+0.00", "%", "+0.00", "%", "to", "+0.00", "%"]
    swapped = compare([takes_with(sim_o=each) for each in (second, first)], [None, None])
    assert table(swapped, ["b", "a"])[1][-1] == "worse"
    loss = figure.difference
    assert find_worse(swapped, {"sim_o": loss - 0.001}) and not find_worse(swapped, {"sim_o": loss + 0.001})
    assert not find_worse({"sim_o": figure}, {"sim_o": 0.0})
    with pytest.raises(ConfigError, match="wer_seedtts: was not measured"):
        find_worse(swapped, {"wer_seedtts": 1.0})


def test_models_are_named_without_what_their_paths_share():
    assert short_names(["runs/voice/final", "runs/voice/checkpoints/step_9"]) == ["final", "checkpoints/step_9"]
    for names in (["runs/a"], ["runs/a", "runs/a/final"], ["/runs/a", "b"], ["a", "a"]):
        assert short_names(names) == names


def test_every_measure_is_explained():
    names = [measure.name for measure in MEASURES]
    assert all(name in evaluate.__doc__ for name in names) and Measure("x", "y").show(None) == "-"


# ---- the command


def run(*argv: object) -> int:
    return evaluate.main([str(item) for item in argv])


CODES = ("--audio_tokenizer", "none", "--device", "cpu", "--temperature", 0, "--ras_win_len", 0, "--max_new_tokens", 40)


@pytest.fixture(scope="module")
def takes_dir(toys, tmp_path_factory) -> Path:
    """Results for four records of the toys, as `generate` writes them: three are perfect, one is missing."""
    folder = tmp_path_factory.mktemp("takes")
    (toys / "four.jsonl").write_text("".join((toys / "test.jsonl").read_text().splitlines(keepends=True)[:4]))
    results = []
    for index, record in enumerate(read_manifest(toys / "four.jsonl")):
        codes, name = np.load(record.audio[-1].path), f"{index:05d}"
        np.save(folder / f"{name}.npy", codes)
        figures = {"frames": codes.shape[1], "target_frames": codes.shape[1], "code_match": 1.0, "stopped": True}
        results.append({"name": name, "codes": f"{name}.npy", **figures})
    write_results(folder, results[:2] + results[3:])
    return folder


def test_results_with_one_missing_against_a_model(takes_dir, loud_dir, toys, tmp_path, capsys):
    """Codes only: three perfect takes and a missing one against an untrained model."""
    out = tmp_path / "out"
    argv = ["--lines", toys / "four.jsonl", "--force_audio", *CODES]
    settings = ["--out", out, *argv, "--fail_if_worse", "runaway_rate:1", "code_match:0"]
    assert run("--ckpt", takes_dir, "--against", loud_dir, *settings) == 0
    printed = capsys.readouterr()
    assert "code_match" in printed.out and "wer" not in printed.out
    assert "nothing was generated for 1 of 4 lines, which count as wrong\n  00002" in printed.err
    found = json.loads((out / "evaluation.json").read_text())
    mine, theirs = found["takes"]
    assert [take["code_match"] for take in mine] == [1, 1, 0, 1] and mine[2]["target_frames"] is theirs[2]["target_frames"] > 0
    figure, total = found["figures"]["code_match"], sum(take["target_frames"] for take in mine)
    assert figure["value"] == 1 - mine[2]["target_frames"] / total and found["figures"]["stop_rate"]["value"] == 0.75
    assert theirs == json.loads(json.dumps(theirs)) and figure["against"] < 0.1 < figure["difference"] and figure["high"] <= 1
    assert found["figures"]["rtf"]["against"] > 0 and found["figures"]["rtf"]["value"] is None
    page = (out / "evaluation.html").read_text()
    assert page.count("<img") == 7 and page.count("<p>nothing was generated</p>") == 1
    assert page.index("<h2>00002</h2>") < page.index("<h2>00000</h2>"), "worst first"

    swapped = ["--ckpt", out / "b", "--against", takes_dir, "--out", tmp_path / "again", *argv]
    assert run(*swapped, "--fail_if_worse", "code_match:10") == 1
    assert "worse: code_match" in capsys.readouterr().err


def test_waveforms_and_judges(judges, codec_dir, loud_dir, tmp_path, capsys):
    """A list of Seed-TTS-eval; one line's sound is lost afterwards. Tiny judges of the real classes, with random weights."""
    asr, sv = judges
    write_wav(tmp_path / "ref.wav", 0.3)
    (tmp_path / "meta.lst").write_text("one|Was.|ref.wav|A bad cab.\ntwo|Was.|ref.wav|Dead beef, café.\n")
    settings = ["--lines", tmp_path / "meta.lst", "--audio_tokenizer", codec_dir, "--asr_model", asr, "--sv_model", sv]
    settings += ["--device", "cpu", "--max_new_tokens", 14, "--force_audio"]
    assert run("--ckpt", loud_dir, "--out", tmp_path / "first", *settings) == 0
    (tmp_path / "first" / "a" / "two.wav").unlink()
    out = tmp_path / "out"
    assert run("--ckpt", tmp_path / "first" / "a", "--out", out, *settings) == 0
    assert "wer_seedtts" in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    ((one, two),) = found["takes"]
    (before, _), figures = json.loads((tmp_path / "first" / "evaluation.json").read_text())["takes"][0], found["figures"]
    assert one == before and one["text"] == "A bad cab." and one["words"] == 3
    assert -1 <= one["sim_o"] <= 1 and one["sim_o"] != one["sim_r"]
    assert two["wer"] == 1 and two["transcript"] == "" and two["sim_o"] == two["sim_r"] == 0
    assert figures["wer_seedtts"]["value"] == (one["wer"] + 1) / 2
    assert figures["wer_pooled"]["value"] == (one["word_errors"] + 3) / 6
    assert found["judged_by"] == {"asr_model": str(asr), "sv_model": str(sv)}
    page = (out / "evaluation.html").read_text()
    assert page.count("<audio") == 3 and 'src="../first/a/one.wav"' in page and page.index("two") < page.index("one</h2>")


def test_mistakes(takes_dir, toys, tmp_path, capsys):
    def error(*argv: object) -> str:
        assert run("--ckpt", takes_dir, "--out", tmp_path / "o", *CODES, *argv) == 2
        return capsys.readouterr().err

    lines = ["--lines", toys / "four.jsonl"]
    assert "--takes: one take of each line is judged" in error(*lines, "--takes", 2, "--temperature", 1)
    assert "there is nothing to compare with; give --against" in error(*lines, "--fail_if_worse", "wer:1")
    both = [*lines, "--against", takes_dir]
    assert "expected NAME:AMOUNT" in error(*both, "--fail_if_worse", "wer")
    assert "--fail_if_worse frames: choose from wer, sim, wer_seedtts" in error(*both, "--fail_if_worse", "frames:1")
    for amount in ("nan", "-1", "inf"):
        assert f"stop_rate:{amount}: expected NAME:AMOUNT" in error(*both, "--fail_if_worse", f"stop_rate:{amount}")
    assert "--fail_if_worse: each figure once" in error(*both, "--fail_if_worse", "stop_rate:1", "stop_rate:2")
    assert "--fail_if_worse wer_seedtts: needs waveforms, so --audio_tokenizer" in error(*both, "--fail_if_worse", "wer:1")
    wavs = [*both, "--audio_tokenizer", "x", "--sv_model", "none"]
    assert "--fail_if_worse sim_o: needs --sv_model" in error(*wavs, "--fail_if_worse", "sim:1")
    assert "--asr_model: judges waveforms" in error(*lines, "--asr_model", "x")
    assert "unknown argument --fail_if_wors; did you mean --fail_if_worse?" in error(*lines, "--fail_if_wors", "wer:1")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file, not a folder" in error(*lines, "--out", tmp_path / "file")
    (tmp_path / "one.jsonl").write_text('{"text": "x", "id": "one"}\n')
    assert "holds results of other lines, such as 00000" in error("--lines", tmp_path / "one.jsonl")
    (tmp_path / "silent.jsonl").write_text('{"text": "..."}\n')
    assert "silent.jsonl record 0 (line 1): text: '...' has no words" in error("--lines", tmp_path / "silent.jsonl")


def evaluate_here(dist, argv: list[str]) -> dict:
    args, options = evaluate.parse_args(argv)
    figures, takes = evaluate.evaluate(args, options, evaluate.lines_of(args, dist), dist)
    return {name: figure.value for name, figure in figures.items() if name != "rtf"} | {"takes": takes}


@pytest.mark.slow
def test_ranks_share_the_lines(loud_dir, toys, takes_dir, tmp_path):
    argv = ["--ckpt", loud_dir, "--lines", toys / "four.jsonl", "--out", tmp_path, "--force_audio", *CODES]
    argv = [str(item) for item in argv]
    (one,) = run_ranks(evaluate_here, 1, argv)
    shutil.rmtree(tmp_path / "a")
    two, again = run_ranks(evaluate_here, 2, argv)
    assert one == two == again and len(one["takes"][0]) == 4
