"""A wav file through the real codec class, and a checkpoint with an audio tower through the real Whisper extractor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import write_manifest
from transformers import HubertConfig, HubertModel

import train
from audio import AudioStore, import_codec, load_codec
from manifest import AudioPart, DataError, Record
from tools import demo

pytest.importorskip("vector_quantize_pytorch", reason="needs requirements-codec.txt")
RATE = 24000


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory) -> Path:
    """A codec folder as upstream loads it (config.json, model.pth): the real class, small and with random weights.

    Its HuBERT is a small random one too; upstream names the published one, which would be downloaded.
    """
    folder = tmp_path_factory.mktemp("codec")
    HubertModel(
        HubertConfig(hidden_size=768, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ).save_pretrained(folder / "hubert")
    config = {
        "n_filters": 32,
        "D": 256,
        "codebook_dim": 64,
        "target_bandwidths": [0.5, 1, 1.5, 2, 4],
        "ratios": [8, 5, 4, 2, 3],
        "sample_rate": RATE,
        "bins": 64,
        "n_q": 8,
        "semantic_techer": "hubert_base_general",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with small_hubert(folder):
        torch.manual_seed(0)
        codec = import_codec().HiggsAudioTokenizer(**config, device="cpu")
        for name, buffer in codec.named_buffers():  # an untrained codebook is initialised from its first batch
            if name.endswith("inited"):
                buffer.fill_(1)
            if name.endswith("embed"):
                buffer.normal_()
        torch.save(codec.state_dict(), folder / "model.pth")
    return folder


class small_hubert:
    """While it lasts, every HuBERT that is asked for is the small one in the folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        self.original = HubertModel.from_pretrained.__func__
        folder, original = self.folder, self.original
        HubertModel.from_pretrained = classmethod(lambda cls, name, **kwargs: original(cls, folder / "hubert"))

    def __exit__(self, *_):
        HubertModel.from_pretrained = classmethod(self.original)


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
    argv = f"--train_manifest {manifest} --output_dir {tmp_path / 'o'} --base_ckpt {tmp_path / 'checkpoint'} --audio_tokenizer {codec_dir}"
    with small_hubert(codec_dir):
        assert train.main([*argv.split(), "--max_steps", "2", "--batch_size", "2", "--num_workers", "0"]) == 0
    files = sorted(np.load(p).shape for p in (tmp_path / "o" / "codes").glob("*.npy"))
    assert files == [(8, 5), (8, 13), (8, 15)]
    (first, *_) = (json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines())
    assert first["audio_targets"] == 8 * (15 + 1 + 5 + 1) and first["audio_loss"] > 0


def test_codes_are_the_codecs(codec_dir, tmp_path):
    """What the store hands out is what the official class says for the same file."""
    write_wav(tmp_path / "a.wav", 0.4)
    with small_hubert(codec_dir):
        codec = load_codec(str(codec_dir), "cpu")
    store = AudioStore(8, 64, 25.0, tmp_path / "codes", "codec")
    part = AudioPart(tmp_path / "a.wav", None, None, True, "here")
    record = Record(None, [part], "record 0")
    assert len(store.missing([record, record])) == 1
    store.encode(codec, store.missing([record]))
    assert store.missing([record]) == []
    assert torch.equal(store.codes(part, "record 0"), codec.encode(str(tmp_path / "a.wav")).long())
    write_wav(tmp_path / "b.wav", 0.03)
    with pytest.raises(DataError, match=r"0\.030 s of audio is less than one frame"):
        store.encode(codec, [(AudioPart(tmp_path / "b.wav", None, None, True, "here"), "record 0")])
    write_wav(tmp_path / "a.wav", 0.4, seed=2)
    assert len(store.missing([record])) == 1, "a changed file has to be encoded again"


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
    with small_hubert(codec_dir):
        argv += (
            f" --audio_tokenizer {codec_dir} --batch_size 1 --grad_accum 2 --max_steps 3 --num_workers 0 --mixed_precision no"
        )
        assert train.main([*argv.split(), "--lr", "1e-2"]) == 0
    before, after = (
        {n: t for n, t in load(tmp_path / p).items() if n.startswith("audio_tower.layers")} for p in ("checkpoint", "o/final")
    )
    assert before and any(not torch.equal(before[n], after[n]) for n in before), "the tower did not learn"


def load(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
