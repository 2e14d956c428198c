"""The transformers snippet of a model card, run; by a Python that has transformers >= 5.18.

    PYTHON tests/native_card.py FOLDER      # in the folder that holds FOLDER and reference.wav; writes answer.wav

The codec is a small one of the real class with random weights, which FOLDER/processor_config.json is made to name. Without
torchaudio, which encodes a reference clip, the two turns of the reference are left out.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
import transformers
from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig


def make_codec(folder: Path) -> None:
    ratios = [8, 5, 4, 2, 3]
    small = {"encoder_hidden_size": 8, "decoder_hidden_size": 64, "hidden_size": 16}
    dac = DacConfig(downsampling_ratios=ratios, upsampling_ratios=ratios, **small)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    hubert = HubertConfig(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, conv_dim=[16] * 7, **size)
    parts = {"acoustic_model_config": dac.to_dict(), "semantic_model_config": hubert.to_dict()}
    config = HiggsAudioV2TokenizerConfig(codebook_size=64, codebook_dim=16, target_bandwidths=[1.2], **parts)
    HiggsAudioV2TokenizerModel(config).save_pretrained(folder)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make_codec(Path("codec"))
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values["audio_tokenizer"]["audio_tokenizer_name_or_path"] = "codec"
    path.write_text(json.dumps(values))
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    code = code.replace("max_new_tokens=1000", "max_new_tokens=24")
    if not transformers.utils.is_torchaudio_available():
        code = re.sub(r'    \{"role": "user".*?"url": "reference.wav"\}\]\},\n', "", code, flags=re.DOTALL)
    exec(code, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
