"""train.py as users run it: the whole command line, its mistakes, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from conftest import ONLY_STEPS, ROOT, write_manifest
from peft import PeftModel
from test_generation import TURNS, clips, overfit
from test_resume import logged
from transformers import AutoTokenizer

import checkpoint
import data
import train
from common import ConfigError
from config import to_argv
from distributed import whole
from generate.official import as_prompt, generate_one
from prepare.audio import AudioStore
from prepare.manifest import read_manifest
from tools import toys as demo


def run_shell(command: str, timeout_sec: int = 180) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_sec, check=False
    )


def metrics(output_dir: Path, split: str) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


# ---- commands of README.md on two ranks (test_readme.py runs them all)


def test_lora_command(toys, tmp_path):
    manifest, output, base = toys / "train.jsonl", tmp_path / "o", toys / "checkpoint"
    done = run_shell(
        f"torchrun --standalone --nproc_per_node=2 train.py --train_manifest {manifest} --output_dir {output} --base_ckpt {base} "
        "--batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 "
        "--val_steps 0 --sample_steps 0 --verbose"
    )
    assert done.returncode == 0, done.stderr
    lines = metrics(output, "train")
    per_step = 2 * 8 * 2
    assert len(lines) == 2 * math.ceil(31 / per_step)
    assert {"step", "epoch", "loss", "text_loss", "audio_loss", "codebook_losses", "eos_loss", "grad_norm", "lr"} <= lines[
        0
    ].keys()
    assert sum(line["audio_targets"] for line in lines if line["epoch"] == 0) == sum(
        line["audio_targets"] for line in lines if line["epoch"] == 1
    ), "labels were lost after the first epoch"
    model = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(base), output / "final")
    assert model.peft_config["default"].r == 16
    assert "input_ids" in done.stderr and "torch.int64" in done.stderr and "text loss" in done.stderr


def test_validation_and_checkpoints(toys, tmp_path, capsys):
    manifest, output, base = toys / "long.jsonl", tmp_path / "o", toys / "checkpoint"
    manifest.write_text((toys / "train.jsonl").read_text() * 3)
    flags = f"--train_manifest {manifest} --output_dir {output} --base_ckpt {base} --device cpu --num_workers 0 --batch_size 4 "
    flags += "--lr 2e-4 --epochs 1 --grad_accum 4 --val_steps 5 --save_steps 5 --sample_steps 0 --audio_tokenizer none"
    assert train.main(flags.split()) == 0
    assert "2 training records are held out" in capsys.readouterr().err
    assert [line["step"] for line in metrics(output, "val")] == [5, 6]
    assert [p.name for p in checkpoint.list_states(output / "checkpoints")] == ["step_5", "step_6"]
    assert (output / "final" / "adapter_model.safetensors").is_file()


# ---- in this process


def settings(toys: Path, output_dir: Path, **extra) -> list[str]:
    values = {
        "train_manifest": toys / "train.jsonl",
        "base_ckpt": toys / "checkpoint",
        "output_dir": output_dir,
        "batch_size": 8,
        "num_workers": 0,
        "max_steps": 2,
        "lr": 5e-3,
        "device": "cpu",
    }
    return to_argv(values | ONLY_STEPS | extra)


def run_here(argv: list[str]):
    """The whole run in this process, without torchrun; returns the trained model."""
    cfg = train.parse_config(argv)
    return train.train(cfg, train.setup_distributed(cfg.device, cfg.replicate))


def first_prompt(toys: Path, tokenizer):
    record = read_manifest(toys / "test.jsonl")[0]
    record.chatml.messages, record.audio = record.chatml.messages[:-1], record.audio[:-1]
    store = AudioStore(8, 64, 25.0, toys / "codes")
    return as_prompt(data.ChatMLDataset([record], tokenizer, store)[0], tokenizer, force_audio=True)  # it has learned little


@pytest.mark.parametrize(("lora_r", "precision"), [(0, "no"), (0, "bf16"), (8, "no")])
def test_final_generates_what_the_trained_model_generates(lora_r, precision, toys, tmp_path):
    """The sharded model in memory and the folder it leaves, loaded by upstream's own classes, say the same."""
    trained = run_here(settings(toys, tmp_path / "o", lora_r=lora_r, mixed_precision=precision, max_steps=6)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o" / "final")
    prompt = first_prompt(toys, tokenizer)
    # FSDP cannot gather in inference mode, which generate() is decorated with; without gradients is all it needs.
    with torch.no_grad():
        expected = generate_one(
            trained, tokenizer, prompt, 30, generate=lambda **kw: HiggsAudioModel.generate.__wrapped__(trained, **kw)
        )
    if lora_r:
        base = HiggsAudioModel.from_pretrained(toys / "checkpoint").eval()
        untrained = generate_one(base, tokenizer, prompt, 30)
        loaded = PeftModel.from_pretrained(base, tmp_path / "o" / "final").eval()
        said = generate_one(base, tokenizer, prompt, 30, generate=loaded.generate)
        assert not torch.equal(said.delayed[0], untrained.delayed[0]), "the adapter has no effect"
    else:
        loaded = HiggsAudioModel.from_pretrained(tmp_path / "o" / "final").eval()
        if precision == "bf16":
            loaded = loaded.bfloat16()
        said = generate_one(loaded, tokenizer, prompt, 30)
    assert expected.delayed[0].shape[1] > 8
    assert torch.equal(said.delayed[0], expected.delayed[0]) and said.token_ids == expected.token_ids


def test_training_learns_and_evaluation_does_not_disturb(toys, tmp_path):
    """Loss falls; evaluating and saving in between changes no bit of the result."""
    quiet = run_here(settings(toys, tmp_path / "a", lora_r=0, mixed_precision="no", max_steps=12))
    extra = {"val_manifest": toys / "val.jsonl", "val_steps": 3, "save_steps": 4}
    busy = run_here(settings(toys, tmp_path / "b", lora_r=0, mixed_precision="no", max_steps=12, **extra))
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(quiet.parameters(), busy.parameters()))
    lines = metrics(tmp_path / "b", "train")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert [line["step"] for line in metrics(tmp_path / "b", "val")] == [3, 6, 9, 12]
    assert [p.name for p in checkpoint.list_states(tmp_path / "b" / "checkpoints")] == ["step_9", "step_12"]
    assert metrics(tmp_path / "b", "val")[-1]["copy_share"] < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_on_a_gpu(toys, tmp_path):
    """LoRA in bf16 with recomputation, workers, pinned batches, evaluation, saving and resuming."""
    extra = {"device": "cuda", "num_workers": 2, "activation_checkpointing": "selective", "save_steps": 2, "val_steps": 2}
    run_here(settings(toys, tmp_path / "o", max_steps=4, **extra))
    run_here(settings(toys, tmp_path / "o", max_steps=6, **extra, resume="auto"))
    lines = metrics(tmp_path / "o", "train")
    assert [line["step"] for line in lines] == list(range(1, 7)) and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["peak_memory_bytes"] > 0


@pytest.fixture()
def any_algorithm(monkeypatch):
    """What --deterministic changes in this process is undone."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_deterministic_algorithms_are_asked_for(toys, tmp_path, any_algorithm):
    """The whole command; what it changes on a CPU is nothing."""
    argv = settings(toys, tmp_path / "a", max_steps=2)
    assert train.main(argv) == 0 and not torch.are_deterministic_algorithms_enabled()
    assert train.main([*argv, "--output_dir", str(tmp_path / "b"), "--deterministic"]) == 0
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("lora_r", [0, 8])
def test_a_gpu_repeats_to_the_bit(lora_r, toys, tmp_path, any_algorithm):
    for name in ("a", "b"):
        extra = {"device": "cuda", "lora_r": lora_r, "consistency_loss_weight": 0.1, "max_steps": 20}
        assert train.main([*settings(toys, tmp_path / name, **extra), "--deterministic"]) == 0
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


def test_lr_schedule():
    cfg = train.parse_config(
        ["--train_manifest", "m", "--output_dir", "o", "--lr", "1", "--warmup_steps", "4", "--min_lr_ratio", "0.1"]
    )
    rates = [train.lr_at(step + 1, 4, (step - 4) / 20, cfg) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55) and rates[24] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_collapsed_checkpoint_is_refused(tmp_path, config, tokenizer, capsys):
    """A base that another trainer has already spoilt: stopped before the first step."""
    samples, _ = clips(tokenizer)
    records = []
    for i, (turns, sample) in enumerate(zip(TURNS, samples)):
        np.save(tmp_path / f"{i}.npy", sample.audio_ids_concat.numpy())
        answer = {"role": "assistant", "content": {"type": "audio", "audio_url": f"{i}.npy"}}
        records.append({"messages": [{"role": "user", "content": turns[0][1]}, answer]})
    model, *_ = overfit(config, samples, unshifted=True)
    model.__class__ = HiggsAudioModel
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    write_manifest(tmp_path / "train.jsonl", records)
    assert "unshifted labels" in main_error(settings(tmp_path, tmp_path / "o"), capsys)
    assert not (tmp_path / "o" / "final").exists()


# ---- mistakes: one clear message, exit status 2, no traceback


def main_error(argv: list[str], capsys) -> str:
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]


def test_command_line_mistakes_are_reported_together(capsys):
    argv = [
        "--output_dir",
        "o",
        "--batch_size",
        "0",
        "--epochs",
        "two",
        "--lr",
        "-1",
        "--lorar",
        "3",
        "--mixed_precision",
        "fp8",
        "--seed",
    ]
    error = main_error(argv, capsys)
    for part in (
        "unknown argument '--lorar'",
        "--batch_size 0: must be at least 1",
        "--epochs two: expected int",
        "--lr -1.0: must be a finite number",
        "--mixed_precision fp8: choose from auto, bf16, fp16, no",
        "--seed needs a value",
        "--train_manifest is required",
    ):
        assert part in error
    named = train.parse_config(["--train_manifest", "m", "--output_dir", "o", "--codebook_weights", "omnivoice"])
    assert named.codebook_weight_list == [8, 8, 6, 6, 4, 4, 2, 2]
    with pytest.raises(ConfigError, match="--codebook_weights 1,x: expected comma-separated numbers"):
        train.parse_config(["--train_manifest", "m", "--output_dir", "o", "--codebook_weights", "1,x"])


def test_every_alias_works():
    argv = "--input_data m --output_dir o --learning_rate 1e-3 --gradient_accumulation_steps 3 --dataloader_num_workers 5"
    cfg = train.parse_config([*argv.split(), "--use_gradient_checkpointing", "selective", "--dry_run"])
    assert (cfg.train_manifest, cfg.lr, cfg.grad_accum, cfg.num_workers) == ("m", 1e-3, 3, 5)
    assert (cfg.activation_checkpointing, cfg.dry_run, cfg.resume) == ("selective", True, "none")
    assert train.parse_config(["--train_data", "m", "--output_dir", "o"]).peak_lr == 2e-4
    assert train.parse_config(["--train_data", "m", "--output_dir", "o", "--lora_r", "0"]).peak_lr == 2e-5


@pytest.fixture()
def bad(toys, tmp_path, capsys):
    """Run with one setting changed; returns the error."""

    def check(**changes) -> str:
        return main_error(settings(toys, tmp_path / "o", **changes), capsys)

    return check


def turns(audio: dict) -> dict:
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": audio}]}


def test_bad_data(bad, tmp_path):
    assert "missing.jsonl: no such manifest" in bad(train_manifest=tmp_path / "missing.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"messages": [}')
    assert "broken.jsonl line 1: broken JSON" in bad(train_manifest=tmp_path / "broken.jsonl")
    manifest = tmp_path / "m.jsonl"
    assert "found keys ['text']" in bad(train_manifest=write_manifest(manifest, [{"text": "hi"}]))
    untrained = {"messages": [{"role": "user", "content": "x"}]}
    assert "nothing to train" in bad(train_manifest=write_manifest(manifest, [untrained]))
    record = {"messages": [{"role": "robot", "content": "x"}]}
    assert 'role: "robot" is not one of' in bad(train_manifest=write_manifest(manifest, [record]))
    missing = turns({"type": "audio", "audio_url": "no.npy"})
    assert "no.npy does not exist" in bad(train_manifest=write_manifest(manifest, [missing]))
    np.save(tmp_path / "wrong.npy", np.zeros((3, 5), np.int64))
    wrong = write_manifest(manifest, [turns({"type": "audio", "audio_url": "wrong.npy"})])
    assert "wrong.npy holds int64 [3, 5]" in bad(train_manifest=wrong)
    np.save(tmp_path / "wrong.npy", np.full((8, 5), 1024))
    for workers in (0, 1):
        assert "holds codes 1024 to 1024" in bad(train_manifest=wrong, num_workers=workers)
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 24000)
    waves = write_manifest(manifest, [turns({"type": "audio", "audio_url": "a.wav"})])
    assert "config.json is not the codec's" in bad(train_manifest=waves, audio_tokenizer=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "config.json is not the codec's" in bad(train_manifest=waves, audio_tokenizer=tmp_path)


def test_bad_checkpoint(bad, toys, tmp_path):
    assert "no config.json" in bad(base_ckpt=tmp_path)
    assert "neither a folder nor a Hub repository" in bad(base_ckpt=tmp_path / "nowhere" / "deep")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type is 'llama'" in bad(base_ckpt=tmp_path)
    whole = toys / "checkpoint"
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    assert "no *.safetensors" in bad(base_ckpt=tmp_path)
    weights = (whole / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    assert "tokenizer" in bad(base_ckpt=tmp_path)
    demo.make_tokenizer().save_pretrained(tmp_path)
    assert "model.safetensors: damaged" in bad(base_ckpt=tmp_path)


def test_a_bad_sample_of_another_rank_is_heard(toys, tmp_path):
    """Rank 1 alone meets an unreadable sample: its message appears, the status is 2, nobody hangs."""
    np.save(tmp_path / "good.npy", np.zeros((8, 5), np.int64))
    np.save(tmp_path / "bad.npy", np.full((8, 5), 1024))
    names = ["good.npy", "bad.npy"] if data.epoch_order([2], [1], 0, 0).tolist() == [0, 1] else ["bad.npy", "good.npy"]
    records = [turns({"type": "audio", "audio_url": name}) for name in names]
    manifest = write_manifest(tmp_path / "m.jsonl", records)
    command = f"python -m tools.launch --standalone --nproc_per_node=2 train.py --train_manifest {manifest} --output_dir {tmp_path / 'o'}"
    done = run_shell(f"{command} --base_ckpt {toys / 'checkpoint'} --batch_size 1 --num_workers 1 --max_bad_samples 0 --sample_steps 0")
    assert done.returncode == 2
    assert (
        "error: 1 samples of the first step cannot be used" in done.stderr and "bad.npy holds codes 1024 to 1024" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_placeholder_without_a_clip_is_clamped_named_and_counted(toys, tmp_path, capsys):
    """A text that holds the token literally: training goes on without that record, or ends with --strict_audio."""
    records = [json.loads(line) for line in (toys / "train.jsonl").read_text().splitlines()[:8]]
    odd = {"messages": [{"role": "user", "content": "say <|AUDIO|>"}, {"role": "assistant", "content": "no"}]}
    manifest = write_manifest(toys / "literal.jsonl", [*records, odd])
    argv = settings(toys, tmp_path / "o", train_manifest=manifest, batch_size=3, epochs=2, max_steps=0, max_bad_samples=0.5)
    assert train.main(argv) == 0
    problem = f"{manifest} record 8 (line 9): 1 audio placeholders but 0 clip(s)"
    assert f"1 sample left out of the loss\n  {problem}; it does not train" in capsys.readouterr().err
    lines = metrics(tmp_path / "o", "train")
    assert lines[-1]["clamped"] == 1 and lines[-1]["bad_samples"] == 0
    sound = settings(toys, tmp_path / "p", train_manifest=write_manifest(toys / "sound.jsonl", records), max_steps=0, batch_size=8)
    assert train.main(sound) == 0
    targets = [sum(line["audio_targets"] for line in run if line["epoch"] == 0) for run in (lines, metrics(tmp_path / "p", "train"))]
    assert targets[0] == targets[1] > 0
    assert train.main([*argv, "--output_dir", str(tmp_path / "few"), "--max_bad_samples", "0"]) == 2
    assert f"error: 1 samples of the first step cannot be used:\n  {problem}; it does not train" in capsys.readouterr().err
    assert train.main([*argv, "--output_dir", str(tmp_path / "strict"), "--strict_audio"]) == 2
    assert f"error: {problem}. Give each" in capsys.readouterr().err


def test_a_large_seed_works(toys, tmp_path):
    run_here(settings(toys, tmp_path / "o", seed=2**31 - 1, max_steps=1))


def test_bad_settings(bad, tmp_path):
    assert "pattern 'qproj' matches nothing" in bad(lora_targets="q_proj,qproj")
    assert "pattern 'vision' matches nothing" in bad(freeze="vision", lora_r=0)
    assert "has 2 values, the checkpoint 8 codebooks" in bad(codebook_weights="1,2")
    assert "--replicate 2 does not divide 1 ranks" in bad(replicate=2)
    assert "not a whole training checkpoint" in bad(resume=tmp_path)
    (tmp_path / "o" / "metrics.jsonl").touch()
    assert "holds a run already" in bad()
