"""Tiny checkpoints of the real classes, and toy voices to train them on: for the demo and for tests.

Nothing is downloaded. A checkpoint is a tiny, randomly initialised `HiggsAudioModel` with a byte-level tokenizer that has the
real special tokens. A toy voice is made of codes: codebooks 0 and 1 are a function of the letter, codebooks 2 to 7 are six
timbre values of the speaker. To follow a new text in a new voice, a model has to read the text, copy the timbre from the
reference clip, keep the delay pattern and stop in time: whatever wrong labels, masks or delays break.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import HubertConfig, HubertModel, PreTrainedTokenizerFast

from common import ConfigError
from prepare.audio import import_codec

SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|recipient|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|AUDIO|>", "<|AUDIO_OUT|>"),
    *("<|scene_desc_start|>", "<|scene_desc_end|>"),
)

# One token each, to keep the tiny model's sequences short; letters stay single tokens.
WORDS = (
    *("system", "user", "assistant", "Generate", " audio", " following", " instruction", "SPEAKER0", "SPEAKER1"),
    *("A quiet room.", "\n\n"),
)

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, without merges: 256 bytes, then the special tokens, then a few words of the prompts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    end = "<|end_of_text|>"
    names = {"bos_token": "<|begin_of_text|>", "eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def tiny_config(tokenizer, **overrides) -> HiggsAudioConfig:
    """The published configuration in miniature: dual FFN in every layer, 8 codebooks, delay pattern, audio-in tokens."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text_config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "pad_token_id": ids["<|end_of_text|>"],
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": ids["<|end_of_text|>"],
    }
    values = {
        "text_config": text_config,
        "audio_encoder_config": {"model_type": "higgs_audio_encoder", "init_std": 0.02},
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": [0, 1, 2],
        "audio_ffn_hidden_size": 128,
        "audio_ffn_intermediate_size": 256,
        "skip_audio_tower": True,
        "encode_whisper_embed": False,
        "encode_audio_in_tokens": True,
        "use_delay_pattern": True,
        "audio_num_codebooks": 8,
        "audio_codebook_size": 64,
        "audio_stream_bos_id": 64,
        "audio_stream_eos_id": 65,
        "audio_in_token_idx": ids["<|AUDIO|>"],
        "audio_out_token_idx": ids["<|AUDIO_OUT|>"],
        "audio_out_bos_token_id": ids["<|audio_out_bos|>"],
        "audio_eos_token_id": ids["<|audio_eos|>"],
        "pad_token_id": ids["<|end_of_text|>"],
        "torch_dtype": "float32",
    }
    return HiggsAudioConfig(**values | overrides)


def make_checkpoint(folder: Path, seed: int = 0, **overrides) -> Path:
    """Save a tiny, randomly initialised checkpoint and its tokenizer to `folder`; overrides: of `tiny_config`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = HiggsAudioModel(tiny_config(tokenizer, **overrides))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_codec(folder: Path, full_size: bool = False, seed: int = 0) -> Path:
    """Save a codec of the official class with random weights, laid out as upstream loads it: config.json, model.pth.

    Its HuBERT is random too, in `folder`/bosonai/hubert_base: upstream loads that relative name, so run in `folder`.

    full_size: the published codec's; else a small one with the same rates and the toys' codebook size
    """
    size = {} if full_size else {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(seed)
    hubert = HubertModel(HubertConfig(**size))
    hubert.save_pretrained(folder / "bosonai" / "hubert_base")
    config = {
        "n_filters": 32,
        "D": 256,
        "codebook_dim": 64,
        "target_bandwidths": [0.5, 1, 1.5, 2, 4],
        "ratios": [8, 5, 4, 2, 3] if full_size else [8, 10, 12],
        "sample_rate": 24000,
        "bins": 1024 if full_size else 64,
        "n_q": 8,
        "semantic_techer": "hubert_base_general",
    }
    (folder / "config.json").write_text(json.dumps(config))
    module = import_codec()
    module.AutoModel = SimpleNamespace(from_pretrained=lambda *_, **__: hubert)
    codec = module.HiggsAudioTokenizer(**config, device="cpu")
    for name, buffer in codec.named_buffers():  # an untrained codebook would be initialised from its first batch
        if name.endswith("inited"):
            buffer.fill_(1)
        if name.endswith("embed"):
            buffer.normal_()
    torch.save(codec.state_dict(), folder / "model.pth")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Voices

LETTERS = "abcdefghijklmnopqrstuvwxyz "
NUM_TIMBRES = 20


@dataclass(frozen=True)
class Speaker:
    name: str
    timbre: tuple[int, ...]  # six codes


def speech(text: str, speaker: Speaker) -> np.ndarray:
    """Codes [8, T] int16: vowels last two frames, everything else one."""
    columns = []
    for letter in text:
        index = LETTERS.index(letter)
        for frame in range(2 if letter in "aeiou" else 1):
            columns.append((index, 2 * index + frame, *speaker.timbre))
    return np.array(columns, dtype=np.int16).T


class Toybox:
    """Seeded texts and speakers, and the ChatML records made from them. Clips are written to `folder`."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.random = np.random.default_rng(seed)
        self.used_texts: set[str] = set()
        self.used_timbres: set[tuple[int, ...]] = set()
        self.num_clips = 0
        self.house = self.speaker("house")  # the voice of records without a reference
        (folder / "clips").mkdir(parents=True, exist_ok=True)

    def speaker(self, name: str) -> Speaker:
        """A speaker with a timbre of its own."""
        while True:
            timbre = tuple(int(v) for v in self.random.integers(0, NUM_TIMBRES, size=6))
            if timbre not in self.used_timbres:
                self.used_timbres.add(timbre)
                return Speaker(name, timbre)

    def text(self, shortest: int = 5, longest: int = 9) -> str:
        """A text that occurs nowhere else: different letters, with a space in those of more than six."""
        while True:
            letters = self.random.permutation(26)[: self.random.integers(shortest, longest + 1)]
            text = "".join(LETTERS[i] for i in letters)
            if len(text) > 6:
                cut = int(self.random.integers(2, len(text) - 2))
                text = f"{text[:cut]} {text[cut + 1 :]}"
            if text not in self.used_texts:
                self.used_texts.add(text)
                return text

    def reference(self) -> str:
        """A text short enough for a reference clip."""
        return self.text(4, 6)

    def clip(self, codes: np.ndarray) -> dict:
        """Write codes and return the audio part that refers to them."""
        name = f"clips/{self.num_clips:05d}.npy"
        self.num_clips += 1
        np.save(self.folder / name, codes)
        return {"type": "audio", "audio_url": name}

    def say(self, text: str, speaker: Speaker) -> dict:
        """The audio part of a new clip with this text."""
        return self.clip(speech(text, speaker))

    # The phrasings of the official inference (examples/generation.py, serve_engine.py upstream)

    def clone_after_exchange(self, speaker: Speaker) -> dict:
        """The reference is an earlier exchange: its transcript from the user, its audio from the assistant."""
        reference, text = self.reference(), self.text()
        return {
            "messages": [
                {"role": "user", "content": reference},
                {"role": "assistant", "content": self.say(reference, speaker)},
                {"role": "user", "content": text},
                {"role": "assistant", "content": self.say(text, speaker)},
            ],
            "start_index": 3,
            "speaker": speaker.name,
            "misc": {"kind": "clone, reference as an exchange"},
        }

    def clone_from_system(self, speaker: Speaker) -> dict:
        """The reference is part of the system turn's scene description."""
        text = self.text()
        scene = [
            {"type": "text", "text": "Generate audio following instruction.\n\n<|scene_desc_start|>\nSPEAKER0: "},
            self.say(self.reference(), speaker),
            {"type": "text", "text": "\n<|scene_desc_end|>"},
        ]
        return {
            "messages": [
                {"role": "system", "content": scene},
                {"role": "user", "content": text},
                {"role": "assistant", "content": self.say(text, speaker)},
            ],
            "speaker": speaker.name,
            "misc": {"kind": "clone, reference in the system turn"},
        }

    def without_reference(self, speaker: Speaker | None = None) -> dict:
        """No reference: a scene or nothing at all; always the house voice, for the prompt names no other."""
        text = self.text()
        scene = "Generate audio following instruction.\n\n<|scene_desc_start|>\nA quiet room.\n<|scene_desc_end|>"
        system = [{"role": "system", "content": scene}] if self.random.random() < 0.5 else []
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": self.say(text, self.house)}]
        return {"messages": system + turns, "speaker": "house", "misc": {"kind": "no reference"}}

    def dialogue(self, speaker: Speaker) -> dict:
        """Two speakers, one exchange each as reference, then both in one clip."""
        voices = (speaker, self.speaker(f"{speaker.name}-partner"))
        messages = []
        for number, voice in enumerate(voices):
            reference = self.reference()
            messages.append({"role": "user", "content": f"[SPEAKER{number}] {reference}"})
            messages.append({"role": "assistant", "content": self.say(reference, voice)})
        texts = [self.text(4, 6) for _ in voices]
        script = "\n".join(f"[SPEAKER{number}] {text}" for number, text in enumerate(texts))
        codes = np.concatenate([speech(text, voice) for text, voice in zip(texts, voices)], axis=1)
        messages.append({"role": "user", "content": script})
        messages.append({"role": "assistant", "content": self.clip(codes)})
        kind = {"kind": "dialogue of two speakers"}
        return {"messages": messages, "start_index": 5, "speaker": speaker.name, "misc": kind}

    def records(self, num_speakers: int, group: str) -> list[dict]:
        """One record of each of so many new speakers, in the demo's mixture of phrasings."""
        kinds = (self.clone_after_exchange, self.clone_from_system, self.without_reference, self.dialogue)
        chosen = self.random.choice(4, size=num_speakers, p=MIXTURE)
        return [kinds[kind](self.speaker(f"{group}-{index}")) for index, kind in enumerate(chosen)]


# ---------------------------------------------------------------------------------------------------------------------
# The demo's data

MIXTURE = (0.38, 0.28, 0.2, 0.14)
NUM_TRAIN_SPEAKERS = 8000  # one record each: timbres that never return have to be copied, not learned
NUM_TEST = {"clone_after_exchange": 20, "clone_from_system": 20, "without_reference": 10, "dialogue": 10}
MARKER = ".made-by-demo"


def make_demo(folder: Path, seed: int = 0, num_speakers: int = NUM_TRAIN_SPEAKERS) -> tuple[Path, Path]:
    """Write the tiny checkpoint and train.jsonl, val.jsonl, test.jsonl; returns (train manifest, checkpoint).

    Speakers and texts of the validation and test manifests are in no other manifest.
    """
    start_afresh(folder)
    toys = Toybox(folder, seed)
    manifests = {
        "train": toys.records(num_speakers, "train"),
        "val": toys.records(32, "val"),
        "test": [getattr(toys, kind)(toys.speaker(f"test-{kind}-{i}")) for kind, n in NUM_TEST.items() for i in range(n)],
    }
    for name, records in manifests.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder / "train.jsonl", make_checkpoint(folder / "checkpoint", seed)


def start_afresh(folder: Path) -> None:
    """Empty a folder of an earlier demo, or make it; raises ConfigError for a folder of anything else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ConfigError(f"--output_dir {folder}: it holds files that no demo wrote; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
