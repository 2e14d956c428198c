"""What the transformers class makes of an exported checkpoint; run by a Python that has transformers >= 5.18.

    PYTHON tests/native.py FOLDER INPUTS.safetensors OUT.safetensors

INPUTS: input_ids, attention_mask, labels [B, S]; audio_input_ids, audio_labels [B, T, K]; audio_input_ids_mask [B, T]
OUT:    loss []; text_loss []; audio_logits [B, S, K, C]; text_logits [B, S, V]; `gradient.NAME` [], the norm of each
        parameter's gradient; metadata: the versions
"""

from __future__ import annotations

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration


def main(folder: str, inputs_path: str, out_path: str) -> None:
    torch.set_num_threads(1)
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, output_loading_info=True)
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    assert not problems, problems
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|AUDIO_OUT|>") == model.config.audio_token_id
    inputs = load_file(inputs_path)
    labels, audio_labels = inputs.pop("labels"), inputs.pop("audio_labels")
    inputs["audio_input_ids_mask"] = inputs["audio_input_ids_mask"].bool()

    hidden = model.model(**inputs).last_hidden_state
    C = model.config.codebook_size
    outputs = {
        "audio_logits": model.audio_lm_head(hidden).unflatten(-1, (-1, C)).detach().contiguous(),
        "text_logits": model.text_lm_head(hidden).detach(),
        "text_loss": model(**inputs, labels=labels).loss.detach(),
    }
    loss = model(**inputs, labels=labels, audio_labels=audio_labels).loss
    loss.backward()
    outputs["loss"] = loss.detach()
    outputs |= {f"gradient.{name}": p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    save_file(outputs, out_path, metadata={"torch": torch.__version__, "transformers": transformers.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:])
