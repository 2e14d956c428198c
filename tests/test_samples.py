"""What evaluation measures and keeps: the same on any number of ranks, samples with their sounds, judges, TensorBoard."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import run_ranks
from test_codec import write_wav
from test_train import main_error, metrics, run_here, settings

import train
from common import ConfigError
from config import to_argv
from distributed import whole
from export import pretrained
from generate import official, samples
from generate.files import read_results
from generate.judges import SpeakerSimilarity, Transcriber
from generate.pictures import DIFFERS, codes_figure, enlarge, media
from generate.samples import Sampler, describe
from generate.scores import Score, word_errors, words_of
from process.monitor import Monitor
from tools import toys as demo

# ---- teacher-forced and free-running, on any number of ranks


def evaluate_and_sample_all(dist, argvs: list[list[str]]) -> list[tuple[list[dict], dict]]:
    return [evaluate_and_sample(dist, argv) for argv in argvs]


def evaluate_and_sample(dist, argv: list[str]) -> tuple[list[dict], dict]:
    """Two evaluations and a round of samples, as in the loop of train.py; also the samples' codes."""
    # An untrained model would not answer with audio.
    samples.as_prompt = functools.partial(official.as_prompt, force_audio=True)
    cfg = train.parse_config([*argv, "--output_dir", f"{argv[-1]}/{dist.world_size}"])
    records, val_records = train.read_records(cfg, dist)
    folder = Path(cfg.base_ckpt)
    config, tokenizer = pretrained.read_base_config(folder), pretrained.load_tokenizer(folder)
    _, loader = train.build_loaders(cfg, dist, config, tokenizer, records, val_records)
    model, _ = train.build_model(cfg, dist, config, folder)
    task = train.Task(model, None, train.build_objective(cfg, config), train.LabelSpec.of(config), dist)
    figures = [train.evaluate(task, loader) for _ in range(2)]
    sampler = Sampler.build(cfg, loader.dataset, dist)
    with train.evaluating(model):
        figures.append(sampler.sample(model, 7, dist))
    written = sampler.folder / "step_7"
    return figures, {path.name: np.load(path) for path in written.glob("*.npy")}


def settings_of(num_records: int, toys: Path, loud_dir: Path, folder: Path) -> list[str]:
    folder.mkdir()
    val = folder / "val.jsonl"
    lines = [json.loads(line) for line in (toys / "val.jsonl").read_text().splitlines()[:num_records]]
    for turn in (turn for line in lines for turn in line["messages"]):
        for part in turn["content"] if isinstance(turn["content"], list) else [turn["content"]]:
            if isinstance(part, dict) and "audio_url" in part:
                part["audio_url"] = str(toys / part["audio_url"])
    val.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"train_manifest": val, "val_manifest": val, "base_ckpt": loud_dir, "audio_tokenizer": "none", "lora_r": 0}
    values |= {"device": "cpu", "num_workers": 0, "sample_steps": 1, "num_samples": 3, "mixed_precision": "no"}
    return to_argv(values) + ["--codes_dir", str(folder)]


def test_figures_do_not_depend_on_ranks_or_repetition(toys, loud_dir, tmp_path):
    """One and two ranks, and fewer records than ranks; losses measured within 3e-7, the samples' codes equal."""
    counts = (1, 5)
    argvs = [settings_of(count, toys, loud_dir, tmp_path / str(count)) for count in counts]
    (alone,) = run_ranks(evaluate_and_sample_all, 1, argvs)
    for num_records, one, *both in zip(counts, alone, *run_ranks(evaluate_and_sample_all, 2, argvs)):
        compare_ranks(num_records, one, *both)


def compare_ranks(num_records: int, alone: tuple, two: tuple, again: tuple) -> None:
    """What one rank found beside what each of two did."""
    one, codes = alone
    assert two[0] == again[0], "every rank knows the same figures"
    assert one[0] == one[1] and two[0][0] == two[0][1], "the same set each time"
    assert one[0].keys() >= {"text_accuracy", "codebook_accuracies", "eos_loss", "eos_accuracy", "copy_share"}
    for name, value in one[0].items():
        assert two[0][0][name] == (value and pytest.approx(value, rel=1e-5, abs=1e-7)), name
    assert two[0][2] == one[2] and one[2]["num_samples"] == min(3, num_records)
    assert codes.keys() == two[1].keys() and len(codes) == min(3, num_records)
    assert all(np.array_equal(codes[name], two[1][name]) and codes[name].shape[1] for name in codes)


def test_sampling_in_a_run(toys, tmp_path):
    """Every so many steps, into metrics.jsonl and samples/; and nothing about the training changes."""
    quiet = run_here(settings(toys, tmp_path / "a", max_steps=3, mixed_precision="no"))
    extra = {"sample_steps": 2, "num_samples": 2, "audio_tokenizer": "none", "val_manifest": toys / "val.jsonl"}
    busy = run_here(settings(toys, tmp_path / "b", max_steps=3, mixed_precision="no", **extra))
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(quiet.parameters(), busy.parameters()))
    lines = metrics(tmp_path / "b", "sample")
    assert [line["step"] for line in lines] == [0, 2, 3], "the base first"
    assert lines[0].keys() >= {"stop_rate", "duration_ratio", "code_match", "num_samples"}
    for step in (2, 3):
        results = read_results(tmp_path / "b" / "samples" / f"step_{step}")
        assert [r["name"] for r in results] == ["0", "1"] and "wav" not in results[0]
        target = np.load(tmp_path / "b" / "samples" / f"step_{step}" / results[0]["target_codes"])
        assert target.shape == (8, results[0]["target_frames"])


def test_mistakes(toys, tmp_path, capsys):
    def error(**changes) -> str:
        return main_error(settings(toys, tmp_path / "o", **({"sample_steps": 1} | changes)), capsys)

    assert "--asr_model and --sv_model judge waveforms" in error(audio_tokenizer="none", asr_model="x")
    assert "--num_samples 0: at least 1" in error(num_samples=0)
    assert "--audio_tokenizer" in error(audio_tokenizer=tmp_path)
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    assert "no record looked at ends with an audio answer" in error(train_manifest=silent, audio_tokenizer="none")
    if not importlib.util.find_spec("wandb"):
        assert "--wandb: No module named 'wandb'; pip install wandb" in error(wandb="project", audio_tokenizer="none")


# ---- judges and sounds


def test_word_errors():
    assert word_errors("", "a b") == (2, 2) and word_errors("a b", "") == (2, 0) and word_errors("", "") == (0, 0)
    assert word_errors("The cat sat.", "the cat -- sat!") == (0, 3)
    assert word_errors("a cat sat down", "the cat sat") == (2, 3)
    draw = random.Random(0)

    @functools.cache
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for _ in range(50):
        a, b = ("".join(draw.choices("xyz", k=draw.randrange(7))) for _ in range(2))
        assert word_errors(" ".join(a), " ".join(b)) == (slow(a, b), len(b))
    assert words_of("[SPEAKER0] Don't stop -- it's “good”!\n[SPEAKER1] 今天。") == [
        "dont",
        "stop",
        "its",
        "good",
        "今",
        "天",
    ]


def test_judges_are_the_named_models(judges, tmp_path):
    from transformers import AutoProcessor, Wav2Vec2ForCTC

    asr, sv = judges
    device = torch.device("cpu")
    write_wav(tmp_path / "a.wav", 1.0, rate=16000)
    write_wav(tmp_path / "b.wav", 1.0, rate=16000, seed=1)
    a, b = (soundfile.read(tmp_path / name, dtype="float32")[0] for name in ("a.wav", "b.wav"))
    processor, model = AutoProcessor.from_pretrained(asr), Wav2Vec2ForCTC.from_pretrained(asr)
    with torch.no_grad():
        ids = model(**processor(a, sampling_rate=16000, return_tensors="pt")).logits.argmax(-1)
    assert Transcriber(str(asr), device)(a, 16000) == processor.batch_decode(ids)[0]
    similarity = SpeakerSimilarity(str(sv), device)
    assert similarity(a, a, 16000) == pytest.approx(1.0, abs=1e-5) and similarity(a, b, 16000) < 1.0 - 1e-5
    for build, flag in ((Transcriber, "--asr_model"), (SpeakerSimilarity, "--sv_model")):
        with pytest.raises(ConfigError, match=f"{flag} {tmp_path}: cannot be loaded"):
            build(str(tmp_path), device)


def test_sounds_judgements_and_tensorboard(judges, codec_dir, toys, tmp_path):
    """With a codec and judges: wavs, figures, and all of it in TensorBoard."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asr, sv = judges
    dist = train.setup_distributed("cpu")
    argv = settings(toys, tmp_path, audio_tokenizer=codec_dir, asr_model=asr, sv_model=sv, num_samples=2, sample_steps=1)
    cfg = train.parse_config(argv)
    tokenizer = demo.make_tokenizer()
    config = demo.tiny_config(tokenizer)
    loader, _ = train.build_loaders(cfg, dist, config, tokenizer, *train.read_records(cfg, dist))
    sampler = Sampler.build(cfg, loader.dataset, dist)
    first, second = sampler.prompts
    silence = torch.zeros((8, 0), dtype=torch.long)
    figures = sampler._keep(5, [([first.target[:, :-1]], True, 0.1), ([silence], False, 0.1)])
    assert figures["stop_rate"] == 0.5 and figures["exact_clips"] == 0
    assert -1 <= figures["speaker_similarity"] <= 1 and figures["word_error_rate"] > 0
    folder = tmp_path / "samples" / "step_5"
    said, silent = read_results(folder)
    samples, rate = soundfile.read(folder / said["wav"])
    assert rate == 24000 and len(samples) == pytest.approx((first.target.shape[1] - 1) * 960, abs=960)
    assert "wav" not in silent and silent["word_errors"] == silent["words"] == len(words_of(second.text))

    kept = Monitor(tmp_path, {"lr": 1.0})
    kept.write(split="val", step=5, epoch=0, loss=0.5, codebook_losses=[0.25, None], eos_loss=None)
    kept.write_samples(5, media(folder))
    Monitor(tmp_path, {"lr": 1.0}, steps_done=5).write(split="val", step=6, loss=0.125)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(5, 0.5), (6, 0.125)]
    assert [e.value for e in events.Scalars("val/codebook_losses/0")] == [0.25] and "val/eos_loss" not in events.Tags()[
        "scalars"
    ]
    image = events.Images("samples/0/codes")[0]
    T = first.target.shape[1]
    assert (image.width, image.height) == (640 // T * T, 6 * (3 * 8 + 2))
    assert set(events.Tags()["audio"]) >= {"samples/0/said", "samples/0/target", "samples/1/target"}
    assert events.Tags()["tensors"]  # the texts


def test_samples_are_described_in_plain_words():
    target = torch.zeros((2, 7), dtype=torch.long)
    one = Score.of(target[:, :2], False, target)
    assert describe(one.metrics()) == "1 sample: 0 ended by itself, 29 % of the target's length, 28.6 % of the codes right"
    two = (one + Score.of(target, True, target)).metrics() | {"word_error_rate": 0.5, "speaker_similarity": 0.25}
    assert describe(two).startswith("2 samples: 1 ended by themselves, 64 % of the target's length")
    assert describe(two).endswith("50.0 % of the words wrong, speaker similarity 0.25")


# ---- the figure


def test_codes_figure():
    target = np.arange(16).reshape(2, 8)
    said = target[:, :7].copy()
    said[1, 3] = 0
    image = codes_figure(said, target)
    wanted, spoken, differs = image[:2], image[3:5], image[6:]
    assert image.shape == (8, 8, 3)
    assert np.array_equal(wanted[:, :7][said == target[:, :7]], spoken[:, :7][said == target[:, :7]])
    assert len(np.unique(wanted.reshape(16, 3), axis=0)) == 16, "different codes, different colours"
    red = (differs == DIFFERS).all(-1)
    assert red.sum() == 3 and red[1, 3] and red[:, 7].all()
    assert (spoken[:, 7] == 255).all()
    assert codes_figure(said[:, :0]).shape == (2, 0, 3)
    assert codes_figure(said[:, :0], target).shape == (8, 8, 3)
    assert np.array_equal(enlarge(image)[::6, :: 640 // 8], image)
