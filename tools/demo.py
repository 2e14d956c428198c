"""The offline demo: train a tiny Higgs Audio v2 on toy voices, then let the official `generate()` speak.

    python -m tools.demo [--output_dir runs/demo] [--seed 0] [--steps N] [--nproc N]

Nothing is downloaded. The checkpoint is a tiny, randomly initialised `HiggsAudioModel` with a byte-level tokenizer that
knows the real special tokens. The *toy voices* speak in codes: codebooks 0 and 1 are a function of the letter being
spoken, codebooks 2 to 7 are six timbre values of the speaker. To speak a new text in a new voice the model has to read the
text, copy the timbre from a reference clip, keep the delay pattern and stop in time: everything that goes wrong when labels,
masks or delays are wrong. The training script is the ordinary `train.py` under FSDP; speakers and texts of the test are in
no manifest it reads.

Legend: K codebooks, T frames.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import HubertConfig, HubertModel, PreTrainedTokenizerFast

from config import to_argv
from generate import __main__ as generate
from generate.scores import Score, table
from prepare.audio import import_codec
from tools import report

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".made-by-demo"

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|recipient|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio_out_bos|>",
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
    "<|scene_desc_start|>",
    "<|scene_desc_end|>",
)

# One token each, to keep the tiny model's sequences short; letters stay single tokens.
WORDS = (
    *("system", "user", "assistant", "Generate", " audio", " following", " instruction", "SPEAKER0", "SPEAKER1"),
    *("A quiet room.", "\n\n"),
)

# ---------------------------------------------------------------------------------------------------------------------
# A tiny checkpoint of the real classes


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, without merges: 256 bytes, then the special tokens, then a few words of the prompts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer, **overrides) -> HiggsAudioConfig:
    """The published configuration in miniature: dual FFN in every layer, 8 codebooks, delay pattern, audio-in tokens."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    values = {
        "text_config": {
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
        },
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
    """Save a tiny, randomly initialised checkpoint and its tokenizer to `folder`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = HiggsAudioModel(tiny_config(tokenizer, **overrides))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_codec(folder: Path, full_size: bool = False, seed: int = 0) -> Path:
    """Save a codec of the official class with random weights, laid out as upstream loads it: config.json, model.pth.

    Its HuBERT is a random one too, in `folder`/bosonai/hubert_base: upstream loads that name, from the Hub if there is no such
    folder where it runs.

    full_size: that of the published codec; else a small one of the same rates, with the demo's codebooks
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
# Toy voices

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
        self.house = self.speaker("house")  # the voice of lines without a reference
        (folder / "clips").mkdir(parents=True, exist_ok=True)

    def speaker(self, name: str) -> Speaker:
        """A speaker whose timbre no other speaker has."""
        while True:
            timbre = tuple(int(v) for v in self.random.integers(0, NUM_TIMBRES, size=6))
            if timbre not in self.used_timbres:
                self.used_timbres.add(timbre)
                return Speaker(name, timbre)

    def text(self, shortest: int = 5, longest: int = 9) -> str:
        """A text that occurs nowhere else: different letters, and a space where it is long."""
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
        """The reference stands in the system turn's scene description."""
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
        """No reference: a scene or nothing at all; always the house voice, since nothing tells which."""
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
        spoken = np.concatenate([speech(text, voice) for text, voice in zip(texts, voices)], axis=1)
        messages.append({"role": "user", "content": script})
        messages.append({"role": "assistant", "content": self.clip(spoken)})
        return {"messages": messages, "start_index": 5, "speaker": speaker.name, "misc": {"kind": "dialogue of two speakers"}}

    def records(self, num_speakers: int, group: str) -> list[dict]:
        """One record of each of so many new speakers, in the demo's mixture of phrasings."""
        kinds = (self.clone_after_exchange, self.clone_from_system, self.without_reference, self.dialogue)
        chosen = self.random.choice(4, size=num_speakers, p=MIXTURE)
        return [kinds[kind](self.speaker(f"{group}-{index}")) for index, kind in enumerate(chosen)]


MIXTURE = (0.38, 0.28, 0.2, 0.14)
NUM_TRAIN_SPEAKERS = 8000  # one record each: timbres that never return have to be copied, not learned
NUM_TEST = {"clone_after_exchange": 20, "clone_from_system": 20, "without_reference": 10, "dialogue": 10}


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
    """Empty a folder of an earlier demo, or make it; a folder of anything else is left alone."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise SystemExit(f"error: {folder} holds something that is not the demo's; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


# ---------------------------------------------------------------------------------------------------------------------
# Train, then listen


# Greedy, codes only. The longest target is 24 frames, to which the delay adds 9; a model that never stops is cut off here.
LISTENING = [
    "--audio_tokenizer",
    "none",
    "--temperature",
    "0",
    "--ras_win_len",
    "0",
    "--max_new_tokens",
    "60",
    "--device",
    "cpu",
]


def listen(checkpoint: Path, manifest: Path, out: Path, force_audio: bool = False) -> dict[str, Score]:
    """Let the official generate() speak the last turn of every record, and compare; by kind of record.

    force_audio: begin the answer with <|audio_out_bos|>, as the serve engine can: an untrained model would not speak at all
    """
    command = ["--ckpt", checkpoint, "--lines", manifest, "--out", out, *LISTENING, *["--force_audio"] * force_audio]
    command = list(map(str, command))
    print("\npython -m generate", *command)
    return generate.run(command)[1]


def print_scores(title: str, scores: dict[str, Score]) -> Score:
    """Print a table and return the score of the zero-shot clones."""
    clones = sum((score for kind, score in scores.items() if kind.startswith("clone")), Score())
    print(f"{title}\n{table(scores)}\n{table({'zero-shot clones, together': clones})}", flush=True)
    return clones


def train(folder: Path, output_dir: Path, seed: int, steps: int, nproc: int, flags: Sequence[str] = ()) -> None:
    """The ordinary train.py under torchrun; flags: more of its own, which win over those here."""
    settings = {
        "train_manifest": folder / "train.jsonl",
        "val_manifest": folder / "val.jsonl",
        "base_ckpt": folder / "checkpoint",
        "output_dir": output_dir,
        "lora_r": 0,
        "batch_size": 16 // nproc if nproc <= 16 else 1,
        "max_steps": steps,
        "lr": 2e-3,
        "warmup_steps": min(50, steps // 5),
        "codebook_weights": "4,1,1,1,1,1,1,1",  # the letters are the hard part: they are read, the timbre is copied
        "mixed_precision": "no",
        "val_steps": max(1, steps // 12),
        "sample_steps": max(1, steps // 4),
        "sample_temperature": 0,
        "audio_tokenizer": "none",  # the toys speak in codes
        "save_steps": max(1, steps // 2),
        "num_workers": 1,
        "seed": seed,
        "device": "cpu",  # the same figures everywhere
    }
    command = [sys.executable, "-m", "tools.launch", f"--nproc_per_node={nproc}", "--standalone", str(ROOT / "train.py")]
    command += [*to_argv(settings), *flags]
    threads = max(1, (os.cpu_count() or 1) // nproc)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": str(ROOT)}
    print("torchrun", " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a tiny model on toy voices and let it speak.", epilog="Other flags are passed to train.py."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--min_match", type=float, default=0.0, help="fail if clones match less than this share of codes")
    args, flags = parser.parse_known_args()

    folder = args.output_dir / "data"
    start_afresh(args.output_dir)
    make_demo(folder, args.seed)
    started = time.perf_counter()
    train(folder, args.output_dir / "run", args.seed, args.steps, args.nproc, flags)
    trained = time.perf_counter()
    test, said = folder / "test.jsonl", args.output_dir / "said"
    untrained = listen(folder / "checkpoint", test, said / "untrained", force_audio=True)
    print_scores("untrained model, official generate():", untrained)
    scores = listen(args.output_dir / "run" / "final", test, said / "trained")
    clones = print_scores(f"trained for {args.steps} steps, held-out speakers and texts, official generate():", scores)
    report.main([str(args.output_dir / "run")])
    print(f"\ntraining {trained - started:.0f} s, generation {time.perf_counter() - trained:.0f} s")
    if clones.code_match < args.min_match:
        raise SystemExit(f"error: clones match {clones.code_match:.1%} of the codes, expected {args.min_match:.1%}")


if __name__ == "__main__":
    main()
