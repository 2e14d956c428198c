"""A wav file through the real codec class, and a checkpoint with an audio tower through the real Whisper extractor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from conftest import write_manifest

import train
from prepare.audio import AudioStore
from tools import toys as demo

RATE = 24000


def write_wav(path: Path, seconds: float, rate: int = RATE, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * time) + 0.05 * rng.standard_normal(len(time)), rate)


def wave(name: str, **extra) -> dict:
    return {"type": "audio", "audio_url": name, **extra}


def test_a_wav_file_trains(codec_dir, tmp_path):
    """wav -> codes -> sample -> batch -> step, with another sample rate, stereo, and a part of a file; encoded once."""
    write_wav(tmp_path / "a.wav", 0.6)
    write_wav(tmp_path / "b.flac", 0.5, rate=16000, seed=1)
    records = [
        {
            "messages": [
                {"role": "user", "content": ["like this: ", wave("b.flac")]},
                {"role": "assistant", "content": wave("a.wav")},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": wave("a.wav", offset=0.2, duration=0.2)},
            ]
        },
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", records)
    demo.make_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "codec").symlink_to(codec_dir)

    def run(name: str, *more: str) -> dict:
        """Train for two steps; the metrics of the first."""
        argv = f"--train_manifest {manifest} --output_dir {tmp_path / name} --base_ckpt {tmp_path / 'checkpoint'} --max_steps 2"
        argv += f" --audio_tokenizer {tmp_path / 'codec'} --batch_size 2 --num_workers 0 --val_steps 0 --sample_steps 0"
        assert train.main([*argv.split(), *more]) == 0
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])

    first = run("first")
    store = AudioStore(8, 64, 25.0, tmp_path / "first" / "codes", str(codec_dir))
    assert sorted(codes.shape for _, codes in store.cache.items()) == [(8, 5), (8, 13), (8, 15)]
    assert first["audio_targets"] == 8 * (15 + 1 + 5 + 1) and first["audio_loss"] > 0
    (tmp_path / "codec").unlink()
    second = run("second", "--codes_dir", str(tmp_path / "first" / "codes"))
    assert second["loss"] == first["loss"], "a full cache is all that training needs"


def test_a_checkpoint_with_whisper_trains(tmp_path, codec_dir):
    """An audio tower, features of the real Whisper extractor, and a batch that holds no audio at all."""
    from test_collate import TOWER

    write_wav(tmp_path / "a.wav", 0.5, rate=16000)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 64, (8, 9)))
    tower = {"audio_encoder_config": dict(TOWER), "skip_audio_tower": False, "encode_whisper_embed": True}
    demo.make_checkpoint(tmp_path / "checkpoint", **tower)
    answer = {"role": "assistant", "content": wave("a.npy")}
    records = [
        {"messages": [{"role": "user", "content": ["hear ", wave("a.wav")]}, answer]},
        {"messages": [{"role": "user", "content": "text"}, {"role": "assistant", "content": "alone"}]},
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", records)
    argv = f"--train_manifest {manifest} --output_dir {tmp_path / 'o'} --base_ckpt {tmp_path / 'checkpoint'} --lora_r 0"
    argv += f" --audio_tokenizer {codec_dir} --batch_size 1 --grad_accum 2 --max_steps 3 --num_workers 0 --mixed_precision no"
    assert train.main([*argv.split(), "--lr", "1e-2"]) == 0
    before, after = (
        {n: t for n, t in load(tmp_path / p).items() if n.startswith("audio_tower.layers")} for p in ("checkpoint", "o/final")
    )
    assert before and any(not torch.equal(before[n], after[n]) for n in before), "the tower did not learn"


def load(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
