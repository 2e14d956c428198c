"""The best step: by any figure of evaluations or samples, patience, final/, warnings, and drift from the base."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from test_resume import logged
from test_train import main_error, metrics, settings

import checkpoint
import model_patch
import train
from config import BEST_BY, OF_SAMPLES
from export import pretrained
from generate.best import contradictions, note
from generate.drift import adapter_off
from generate.scores import Score
from tools import toys as demo


def history(metric: str, *rounds: float | None) -> dict:
    best: dict = {}
    for step, value in enumerate(rounds):
        best = note(best, metric, {metric: value}, step)
    return best


def test_the_best_step_by_any_figure():
    assert history("loss", 1.0, 3.0, 2.0, 2.0, 2.5) == {"metric": "loss", "value": 2.0, "step": 2, "waited": 2}
    assert history("code_match", 1.0, 0.25, 0.75, 0.5) == {"metric": "code_match", "value": 0.75, "step": 2, "waited": 1}
    assert history("duration_ratio", 9.0, 3.0, 0.5, 1.4, 1.6)["step"] == 3
    assert history("stop_rate", 0.0, 0.5, None, float("nan")) == {"metric": "stop_rate", "value": 0.5, "step": 1, "waited": 1}
    assert note({"metric": "loss", "value": 1.0, "step": 3}, "loss", {"stop_rate": 1.0}, 4) == {"metric": "loss", "value": 1.0, "step": 3}
    target = torch.zeros((2, 7), dtype=torch.long)
    measured = Score.of(target, True, target).metrics()
    assert {name for name in OF_SAMPLES if name in measured} == set(OF_SAMPLES) - {"word_error_rate", "speaker_similarity"}


def test_samples_that_contradict_the_loss():
    samples, found = contradictions({}, None, {"code_match": 0.9}, 0)
    assert not samples and not found, "no evaluation yet"
    samples, found = contradictions({}, 2.0, {"code_match": 0.9, "stop_rate": 0.5}, 10)
    assert not found
    samples, found = contradictions(json.loads(json.dumps(samples)), 1.5, {"code_match": 0.85, "stop_rate": 0.75}, 20)
    assert not found and samples["code_match"] == [0.9, 10, 2.0] and samples["stop_rate"] == [0.75, 20, 1.5]
    _, found = contradictions(samples, 2.5, {"code_match": 0.1, "stop_rate": 0.0}, 30)
    assert not found, "both got worse"
    _, (found,) = contradictions(samples, 1.8, {"code_match": 0.5, "stop_rate": 0.0}, 30)
    assert "since step 10 (2.0000 to 1.8000) but samples are worse: code_match 0.900 to 0.500" in found


def test_impossible_settings_are_refused(toys, tmp_path, capsys):
    def error(**changes) -> str:
        return main_error(settings(toys, tmp_path / "o", **changes), capsys)

    assert "--best_by code_match: is measured on samples; give --sample_steps" in error(best_by="code_match")
    assert "--best_by word_error_rate: needs --asr_model" in error(best_by="word_error_rate", sample_steps=1)
    assert "--best_by speaker_similarity: needs --sv_model" in error(best_by="speaker_similarity", sample_steps=1)
    assert "--best_by drift: needs --drift_manifest" in error(best_by="drift", val_steps=1)
    assert "--patience and --final best need --best_by" in error(best_by="", patience=1)
    final = error(final="best")
    assert "--final best: checkpoints are kept with --save_steps" in final and "needs --val_manifest or --val_steps" in final
    assert "--drift_manifest: is measured at evaluations" in error(drift_manifest="x")
    assert "--sample_texts: samples are generated with --sample_steps" in error(sample_texts="x")
    assert f"choose from {', '.join(BEST_BY)}" in error(best_by="accuracy")
    (tmp_path / "voices.jsonl").write_text('{"text": "Hi.", "ref_audio": "a.wav", "ref_text": "x"}\n')
    (tmp_path / "a.wav").write_bytes(b"")
    own = {"sample_steps": 1, "audio_tokenizer": "none"}
    assert "waveforms, which need a codec" in error(sample_texts=tmp_path / "voices.jsonl", **own)
    assert "--sample_texts no.txt: cannot be read" in error(sample_texts="no.txt", **own)
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt: the file is empty" in error(sample_texts=tmp_path / "empty.txt", **own)


@pytest.fixture(scope="module")
def tuned(toys, tmp_path_factory):
    """A full fine-tune that ends by --patience, with samples of two texts of its own: its folder, and what it logged."""
    folder = tmp_path_factory.mktemp("tuned")
    records = (toys / "test.jsonl").read_text().splitlines()[-2:]
    (toys / "others.jsonl").write_text("\n".join(records) + "\n")
    (folder / "texts.txt").write_text("abc def\n\n  hello  \n")
    extra = {"lora_r": 0, "mixed_precision": "no", "val_manifest": toys / "val.jsonl", "audio_tokenizer": "none", "max_steps": 9}
    extra |= {"val_steps": 1, "sample_steps": 2, "num_samples": 1, "save_steps": 1, "keep_last": 1, "final": "best", "patience": 2}
    extra |= {"drift_manifest": toys / "others.jsonl", "best_by": "drift", "sample_texts": folder / "texts.txt"}
    assert train.main(settings(toys, folder / "o", **extra)) == 0
    return folder / "o"


def test_patience_and_the_best_model(tuned, toys):
    """Drift only grows, so the first step is the best: the run ends early, keeps that checkpoint and exports it."""
    drift = {line["step"]: line for line in metrics(tuned, "val")}
    assert list(drift) == [1, 2, 3, 4], "two without improvement, and the last"
    values = [line["drift"] for line in drift.values()]
    assert 0 < values[0] < values[1] < values[2]
    assert all(line["drift"] == line["drift_text"] + line["drift_audio"] for line in drift.values())
    assert [path.name for path in checkpoint.list_states(tuned / "checkpoints")] == ["step_1", "step_4"]
    stored = pretrained.Stored(tuned / "checkpoints" / "step_1")
    final = load_file(tuned / "final" / "model.safetensors")
    same = [torch.equal(final[name], stored.read(f"model.{name}").to(final[name].dtype)) for name in final]
    assert all(same) and len(same) > 30


def test_the_base_and_own_texts_are_sampled(tuned):
    lines = metrics(tuned, "sample")
    assert [line["step"] for line in lines] == [0, 2, 4] and all(line["num_samples"] == 3 for line in lines)
    results = [json.loads(line) for line in (tuned / "samples" / "step_0" / "results.jsonl").read_text().splitlines()]
    assert [result["name"] for result in results] == ["0", "text-0", "text-1"]
    assert [result["text"] for result in results[1:]] == ["abc def.", "hello."]
    assert "target_frames" in results[0] and "target_frames" not in results[1] and "code_match" not in results[1]


def test_drift_of_an_adapter(toys, tmp_path):
    """The adapter is switched off for the base's predictions: 0 where it has no effect, above it after training."""
    extra = {"val_manifest": toys / "val.jsonl", "drift_manifest": toys / "test.jsonl", "val_steps": 1, "max_steps": 2}
    assert train.main(settings(toys, tmp_path / "o", mixed_precision="no", **extra)) == 0
    first, second = (line["drift"] for line in metrics(tmp_path / "o", "val"))
    assert 0 < first < second and not (tmp_path / "o" / "drift.safetensors").exists()
    assert not any("drift" in line for line in logged(tmp_path / "o") if line["split"] == "train")


def test_the_adapter_is_off_only_within_the_context(config):
    model = model_patch.patch_for_training(make_model(config))
    model_patch.add_lora(model, r=4, alpha=8, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    layer = model.layers[0].self_attn.q_proj
    hidden = torch.randn(3, 128)
    on = layer(hidden)
    with adapter_off(model):
        assert torch.equal(layer(hidden), layer.base_layer(hidden))
    assert torch.equal(layer(hidden), on) and not torch.equal(on, layer.base_layer(hidden))


@pytest.mark.slow
def test_a_better_loss_with_worse_letters(tmp_path):
    """The learning rate is too high: the validation loss keeps falling while the samples' codes get worse. That is said, and
    --best_by code_match keeps another step than --best_by loss (measured: 60 and 120)."""
    demo.make_demo(tmp_path / "toys", seed=1, num_speakers=400)
    extra = {"lora_r": 0, "batch_size": 16, "max_steps": 120, "lr": 1e-2, "warmup_steps": 5, "mixed_precision": "no"}
    extra |= {"val_manifest": tmp_path / "toys" / "val.jsonl", "audio_tokenizer": "none", "val_steps": 10, "sample_steps": 10}
    extra |= {"num_samples": 8, "sample_temperature": 0, "save_steps": 10, "keep_last": 1}
    kept = {}
    for best_by in ("loss", "code_match"):
        output, log = tmp_path / best_by, io.StringIO()
        with contextlib.redirect_stderr(log):
            assert train.main(settings(tmp_path / "toys", output, best_by=best_by, **extra)) == 0
        assert "warning: the validation loss has improved since step" in log.getvalue()
        assert "but samples are worse: code_match" in log.getvalue()
        kept[best_by] = {path.name for path in checkpoint.list_states(output / "checkpoints")}
    assert kept["loss"] != kept["code_match"]
