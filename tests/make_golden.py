"""Make golden/native_loss.safetensors: the transformers class's own loss on a checkpoint that we exported.

    PYTHONPATH=. python tests/make_golden.py PYTHON      # one with torch and transformers >= 5.18

The file holds the weights (in bfloat16, exact in float32 too), and the loss and each gradient's norm by the names of the
original layout; its metadata says what made it. `test_layouts.py` computes the same with `HiggsAudioModel` and loss.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from conftest import make_model, make_sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import collate
from export import layouts, merge, read
from loss import IGNORE_INDEX
from tools import toys as demo
from tools.synthetic import PUBLISHED_ROPE

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "native_loss.safetensors"

# References in the system turn and as an exchange, text and audio in one answer, two clips in one sample, padding.
CONVERSATIONS = (
    [("system", "voice: ", 6, "."), ("user", "speak"), ("assistant", 7)],
    [("user", "ref"), ("assistant", 5), ("user", "a longer text than the other"), ("assistant", "words, then", 12, "and", 3)],
)


def golden_config(tokenizer) -> HiggsAudioConfig:
    """Small enough that its weights can be committed."""
    config = demo.tiny_config(tokenizer, audio_dual_ffn_layers=[0, 1])
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config.text_config.update(values | PUBLISHED_ROPE)
    config.audio_ffn_hidden_size, config.audio_ffn_intermediate_size = 32, 48
    return config


def make_batch(config: HiggsAudioConfig, tokenizer) -> collate.Batch:
    samples = [
        make_sample(tokenizer, *turns, seed=seed, start_index=1 if seed == 0 else 3) for seed, turns in enumerate(CONVERSATIONS)
    ]
    return collate.create_collator(config)(samples)


def native_inputs(batch, output, config: HiggsAudioConfig) -> dict[str, Tensor]:
    """Our batch and labels as the transformers class takes them; see tests/native.py.

    There every audio frame has one placeholder in the text, whatever it is for, and frames stand in the order of their
    placeholders. `output` is upstream's, with the placeholders expanded; its k-th <|AUDIO_OUT|> holds column k of
    `audio_out_ids`, and <|AUDIO|> likewise.
    """
    ids, labels = output.expanded_input_ids, output.expanded_labels
    B, K = len(ids), config.audio_num_codebooks
    heard, spoken = ids == config.audio_in_token_idx, ids == config.audio_out_token_idx
    codes = torch.zeros(*ids.shape, K, dtype=torch.long)
    targets = torch.full_like(codes, IGNORE_INDEX)
    if heard.any():
        codes[heard] = batch.audio_in_ids.T
    codes[spoken], targets[spoken] = batch.audio_out_ids.T, batch.label_audio_ids.T
    is_audio = heard | spoken
    T = int(is_audio.sum(1).max())
    frames = torch.full((B, T, K), config.audio_stream_eos_id)
    frame_targets = torch.full((B, T, K), IGNORE_INDEX)
    mask = torch.arange(T) < is_audio.sum(1, keepdim=True)
    frames[mask], frame_targets[mask] = codes[is_audio], targets[is_audio]
    return {
        "input_ids": ids.masked_fill(heard, config.audio_out_token_idx),
        "attention_mask": output.attention_mask.long(),
        "labels": labels,
        "audio_input_ids": frames,
        "audio_labels": frame_targets,
        "audio_input_ids_mask": mask.to(torch.uint8),
    }


def ask_native(python: str, model: HiggsAudioModel, tokenizer, folder: Path) -> tuple[dict[str, Tensor], dict]:
    """What the transformers class says about `make_batch`, on the model as we export it; and its versions."""
    model.save_pretrained(folder / "boson")
    tokenizer.save_pretrained(folder / "boson")
    merge.convert(read.open_model(folder / "boson"), folder / "transformers", "transformers")
    batch = make_batch(model.config, tokenizer)
    with torch.no_grad():
        output = model(**batch.model_inputs())
    inputs = {name: tensor.contiguous() for name, tensor in native_inputs(batch, output, model.config).items()}
    save_file(inputs, folder / "inputs.safetensors")
    out = folder / "out.safetensors"
    command = [
        python,
        str(ROOT / "tests" / "native.py"),
        str(folder / "transformers"),
        str(folder / "inputs.safetensors"),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    with safe_open(out, framework="pt") as file:
        return load_file(out), file.metadata()


def main(python: str) -> None:
    tokenizer = demo.make_tokenizer()
    model = make_model(golden_config(tokenizer))
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        said, metadata = ask_native(python, model, tokenizer, Path(folder))
    kept = {"loss": said["loss"], "text_loss": said["text_loss"]}
    for name, tensor in said.items():
        if name.startswith("gradient."):
            kept[f"gradient.{layouts.rename(name.removeprefix('gradient.'), 'boson')}"] = tensor
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(kept | {f"weight.{name}": tensor for name, tensor in weights.items()}, GOLDEN, metadata=metadata)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes, loss {said['loss'].item():.6f}, {metadata}")


if __name__ == "__main__":
    main(sys.argv[1])
