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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import HubertConfig, HubertModel, PreTrainedTokenizerFast

from common import ConfigError
from prepare import prompts
from prepare.audio import FRAME_RATE_HZ, import_codec
from prepare.prompts import Voice

SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|recipient|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|AUDIO|>", "<|AUDIO_OUT|>"),
    *("<|scene_desc_start|>", "<|scene_desc_end|>"),
)

# One token each, to keep the tiny model's sequences short; letters stay single tokens.
WORDS = (
    *("system", "user", "assistant", prompts.INSTRUCTION, "[SPEAKER0] ", "[SPEAKER1] ", "[SPEAKER2] "),
    *("SPEAKER0", "SPEAKER1", prompts.QUIET_ROOM, "\n\n"),
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


def tiny_config(tokenizer, *, text: Mapping = MappingProxyType({}), **overrides) -> HiggsAudioConfig:
    """The published configuration in miniature: dual FFN in every layer, 8 codebooks, delay pattern, audio-in tokens.

    text, overrides: other values, of the text model and of the rest
    """
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
        "text_config": text_config | dict(text),
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
SILENCE = (27, 54, *(NUM_TIMBRES,) * 6)  # a frame between two turns: in every codebook a code that no voice has


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


def script(texts: Sequence[str]) -> str:
    """The text of a dialogue, or of one speaker; it ends as `prompts.normalise` has texts end."""
    return f"{texts[0]}." if len(texts) == 1 else "\n".join(f"[SPEAKER{n}] {text}." for n, text in enumerate(texts))


def joined(turns: Sequence[np.ndarray]) -> np.ndarray:
    """The codes of a dialogue: its turns [8, T] with a frame of silence between them."""
    silence = np.array([SILENCE], np.int16).T
    return np.concatenate([piece for turn in turns for piece in (silence, turn)][1:], axis=1)


class Kind(NamedTuple):
    """A kind of record, phrased as the official inference does."""

    name: str
    num_references: int  # one of each speaker
    in_system: bool  # references are in the system turn, else each is an earlier exchange
    fewest: int  # letters of a turn
    most: int
    share: float  # of the training data
    num_tests: int


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

    def draw(self, fewest: int, most: int, count: int = 1) -> list[str]:
        """Texts of so many letters: all their letters differ, with a space in those of more than six."""
        letters = "".join(LETTERS[i] for i in self.random.permutation(16))
        ends = np.cumsum(self.random.integers(fewest, most + 1, size=count)).tolist()
        texts = [letters[start:end] for start, end in zip([0, *ends], ends)]
        for n, text in enumerate(texts):
            if len(text) > 6:
                cut = int(self.random.integers(2, len(text) - 2))
                texts[n] = f"{text[:cut]} {text[cut + 1 :]}"
        return texts

    def texts(self, *lengths: int) -> list[str]:
        """Texts as `draw` gives them that no other clip says, reference clips aside."""
        while self.used_texts.intersection(texts := self.draw(*lengths)):
            pass
        self.used_texts.update(texts)
        return texts

    def clip(self, codes: np.ndarray) -> dict:
        """Write codes and return the audio part that refers to them."""
        name = f"clips/{self.num_clips:05d}.npy"
        self.num_clips += 1
        np.save(self.folder / name, codes)
        return {"type": "audio", "audio_url": name}

    def record(self, kind: Kind, name: str) -> dict:
        """A ChatML record with new texts and new speakers: `name`, `name`-1 and so on.

        The house speaks without a reference.
        """
        speakers = [self.speaker(f"{name}-{n}" if n else name) for n in range(kind.num_references)]
        transcripts = [text for _ in speakers for text in self.draw(3, 4)]
        clips = [self.clip(speech(text, speaker)) for text, speaker in zip(transcripts, speakers)]
        voices = [Voice(clip, None if kind.in_system else text) for clip, text in zip(clips, transcripts)]
        speakers = speakers or [self.house]
        texts = self.texts(kind.fewest, kind.most, len(speakers))
        turns = [speech(text, speaker) for text, speaker in zip(texts, speakers)]
        scene = prompts.QUIET_ROOM if not voices and self.random.random() < 0.5 else ""
        made = prompts.record(script(texts), self.clip(joined(turns)), voices, scene, speaker=speakers[0].name)
        begins = np.cumsum([turn.shape[1] + 1 for turn in turns[:-1]]) / FRAME_RATE_HZ
        return made | {"misc": {"kind": kind.name, "speaker_changes_sec": begins.tolist()}}

    def records(self, num_speakers: int, group: str) -> list[dict]:
        """So many records in the demo's mixture of kinds."""
        chosen = self.random.choice(len(KINDS), size=num_speakers, p=[kind.share for kind in KINDS])
        return [self.record(KINDS[kind], f"{group}-{index}") for index, kind in enumerate(chosen)]


# ---------------------------------------------------------------------------------------------------------------------
# The demo's data

KINDS = (
    Kind("clone, reference as an exchange", 1, False, 5, 9, share=0.18, num_tests=20),
    Kind("clone, reference in the system turn", 1, True, 5, 9, share=0.18, num_tests=20),
    Kind("no reference", 0, False, 5, 9, share=0.06, num_tests=10),
    Kind("dialogue of two speakers", 2, False, 4, 5, share=0.24, num_tests=10),
    Kind("dialogue of three speakers", 3, False, 4, 5, share=0.34, num_tests=10),
)
SHAPE = {"rope_theta": 100.0, "num_key_value_heads": 4}  # of its model; contexts are short
NUM_TRAIN_SPEAKERS = 25600  # records: timbres that never return have to be copied, not learned
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
        "test": [toys.record(kind, f"test-{n}-{i}") for n, kind in enumerate(KINDS) for i in range(kind.num_tests)],
    }
    for name, records in manifests.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder / "train.jsonl", make_checkpoint(folder / "checkpoint", seed, text=SHAPE)


def start_afresh(folder: Path) -> None:
    """Empty a folder of an earlier demo, or make it; raises ConfigError for a folder of anything else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ConfigError(f"--output_dir {folder}: it holds files that no demo wrote; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
