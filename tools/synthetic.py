"""Random models of any size, and random clips to train them on: for benchmarks and the planner.

`SIZES` are configurations of the real class. `make_checkpoint` writes random weights file by file, so that even the
published size needs little memory. `write_clones` writes a manifest of zero-shot clones with random codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from safetensors.torch import save_file
from torch import Tensor

import model_patch
from tools import toys

FRAME_RATE_HZ = 25
TOKENS_PER_SEC = 4  # 3 English words, about 4 tokens of the published tokenizer
REFERENCE_SEC = (3.0, 10.0)
TARGET_SEC = (2.0, 20.0)

_CODEBOOKS = {"audio_codebook_size": 1024, "audio_stream_bos_id": 1024, "audio_stream_eos_id": 1025}

# (hidden size, FFN size, layers, attention heads, key and value heads, vocabulary), and changes to the toys' audio settings
SIZES: dict[str, tuple[tuple[int, ...], dict]] = {
    "tiny": ((128, 256, 3, 4, 2, 288), {}),
    "mini": ((768, 2048, 8, 6, 2, 9168), {}),  # heads : body as in the published size
    "vocab": ((256, 688, 2, 4, 2, 128256), _CODEBOOKS),
    "real": ((3072, 8192, 28, 24, 8, 128256), _CODEBOOKS),  # bosonai/higgs-audio-v2-generation-3B-base
}

PUBLISHED_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def make_config(size: str) -> HiggsAudioConfig:
    """The configuration of a size, with the special ids of the toy tokenizer."""
    (hidden, ffn, layers, heads, kv_heads, vocab), audio = SIZES[size]
    tokenizer = toys.make_tokenizer()
    text_config = toys.tiny_config(tokenizer).text_config.to_dict() | PUBLISHED_ROPE
    text_config |= {
        "max_position_embeddings": 131072,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
    }
    sizes = {"audio_ffn_hidden_size": hidden, "audio_ffn_intermediate_size": ffn}
    return toys.tiny_config(tokenizer, text_config=text_config, audio_dual_ffn_layers=list(range(layers)), **sizes, **audio)


def make_checkpoint(folder: Path, config: HiggsAudioConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A Hugging Face folder of random weights: one file per layer and one for the rest, written one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model_patch.build_on_meta(config).named_parameters():
        part = name.split(".")
        groups.setdefault(".".join(part[:2]) if part[0] == "layers" else "rest", {})[name] = parameter
    generator = torch.Generator().manual_seed(seed)
    index: dict = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, group in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(dict(_random_weights(group, dtype, generator)), folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(group, file)
        index["metadata"]["total_size"] += sum(p.numel() for p in group.values()) * dtype.itemsize
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.torch_dtype = dtype
    config.save_pretrained(folder)
    toys.make_tokenizer().save_pretrained(folder)
    return folder


def _random_weights(shapes: dict[str, Tensor], dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in shapes.items():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape, dtype=dtype)
        else:
            yield name, torch.empty(parameter.shape, dtype=dtype).normal_(0, 0.02, generator=generator)


def clone_durations(num_records: int, stretch: float = 1.0, seed: int = 0) -> np.ndarray:
    """[records, 2] seconds of reference and target, uniform in REFERENCE_SEC and TARGET_SEC, times `stretch`."""
    low, high = np.array([REFERENCE_SEC, TARGET_SEC]).T
    return stretch * np.random.default_rng(seed).uniform(low, high, size=(num_records, 2))


def write_clones(folder: Path, seconds: np.ndarray, codebook_size: int, seed: int = 0) -> Path:
    """Write random codes and a manifest of clones whose reference is an earlier exchange; returns the manifest.

    seconds: [records, 2], reference and target; texts are TOKENS_PER_SEC random letters, a token each
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    with open(folder / "clones.jsonl", "w") as file:
        for number, durations in enumerate(seconds):
            messages = []
            for kind, duration in zip(("reference", "target"), durations):
                text = "".join(rng.choice(letters, max(1, round(TOKENS_PER_SEC * duration))))
                name = f"{kind}{number}.npy"
                frames = max(1, round(FRAME_RATE_HZ * duration))
                np.save(folder / name, rng.integers(0, codebook_size, (8, frames), dtype=np.int16))
                messages += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": {"type": "audio", "audio_url": name}},
                ]
            file.write(json.dumps({"messages": messages, "start_index": 3}) + "\n")
    return folder / "clones.jsonl"
