"""Two layouts of the same weights: the original one, and the one of transformers >= 5.3. This file translates names and
configurations; tensors have the same values and shapes in both.

             boson (`HiggsAudioModel`)               transformers (`HiggsAudioV2ForConditionalGeneration`)
  names      audio_codebook_embeddings.*             model.embed_audio_tokens.embed_audio_tokens.*
             embed_tokens.* layers.* norm.*          model.embed_tokens.* model.layers.* model.norm.*
             audio_decoder_proj.{text,audio}_lm_head {text,audio}_lm_head
  config     nested: text_config, audio_*            flat
             audio_codebook_size 1024                codebook_size 1026: it counts the two stream ids
             rope_theta, rope_scaling                rope_parameters
             <|AUDIO|> stands for input audio        one audio token for both, that of <|AUDIO_OUT|>
             <|end_of_text|> or <|eot_id|> stop      <|eot_id|> stops, a delay token marks the tail of a clip

The newer class has nothing but dual-FFN layers and codes: a checkpoint with an audio tower stays in the original layout.
It drops its text head when it saves, unless it was made with `use_text_head=True`; training needs that head.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from transformers import PreTrainedTokenizerBase

from common import read_json

Layout = Literal["boson", "transformers"]

LAYOUTS: dict[str, Layout] = {"higgs_audio": "boson", "higgs_audio_v2": "transformers"}  # by model_type
DELAY_TOKEN = "<|reserved_special_token_6|>"  # the transformers processor's choice
CODEC = "eustlb/higgs-audio-v2-tokenizer"  # the codec's weights for the transformers class, as its documentation names them

_TO_TRANSFORMERS = (
    (r"^audio_codebook_embeddings\.", "model.embed_audio_tokens.embed_audio_tokens."),
    (r"^(embed_tokens|layers|norm)\.", r"model.\1."),
    (r"^audio_decoder_proj\.(text|audio)_lm_head\.", r"\1_lm_head."),
)
_TO_BOSON = (
    (r"^model\.embed_audio_tokens\.embed_audio_tokens\.", "audio_codebook_embeddings."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"\1."),
    (r"^(text|audio)_lm_head\.", r"audio_decoder_proj.\1_lm_head."),
)

# Settings of the Llama inside that have the same name in both configurations.
_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias", "mlp_bias"),
)


def layout_of(folder: Path) -> Layout | None:
    """The layout of a checkpoint folder, or None if its config.json names neither; OSError or ValueError if unreadable."""
    return LAYOUTS.get(read_json(folder / "config.json").get("model_type"))


def rename(name: str, layout: Layout) -> str:
    """A tensor's name in `layout`, from its name in either."""
    for pattern, replacement in _TO_TRANSFORMERS if layout == "transformers" else _TO_BOSON:
        name = re.sub(pattern, replacement, name)
    return name


def to_boson(values: dict, tokenizer: PreTrainedTokenizerBase) -> HiggsAudioConfig:
    """The original configuration of a checkpoint in the newer layout.

    values:    its config.json
    tokenizer: has the ids that the newer configuration lacks
    raises:    ValueError, naming the setting or token that is missing
    """
    missing = [name for name in (*_LLAMA, "rope_parameters", "num_codebooks", "codebook_size") if name not in values]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    rope = dict(values["rope_parameters"])
    text = {name: values[name] for name in _LLAMA} | {
        "model_type": "llama",
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": values["pad_token_id"],
        "torch_dtype": _dtype(values),
    }
    return HiggsAudioConfig(
        text_config=text,
        audio_encoder_config={"model_type": "higgs_audio_encoder", "pad_token_id": values["pad_token_id"]},
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(values["num_hidden_layers"])),
        audio_ffn_hidden_size=values["hidden_size"],
        audio_ffn_intermediate_size=values["intermediate_size"],
        skip_audio_tower=True,
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
        use_delay_pattern=True,
        audio_num_codebooks=values["num_codebooks"],
        audio_codebook_size=values["codebook_size"] - 2,
        audio_stream_bos_id=values["audio_stream_bos_id"],
        audio_stream_eos_id=values["audio_stream_eos_id"],
        audio_in_token_idx=_token_id(tokenizer, "<|AUDIO|>"),
        audio_out_token_idx=values["audio_token_id"],
        audio_out_bos_token_id=values["audio_bos_token_id"],
        audio_eos_token_id=_token_id(tokenizer, "<|audio_eos|>"),
        pad_token_id=values["pad_token_id"],
        torch_dtype=_dtype(values),
        architectures=["HiggsAudioModel"],
    )


def to_transformers(config: HiggsAudioConfig, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The newer config.json of a checkpoint in the original layout.

    raises: ValueError, naming what the newer class cannot hold
    """
    text = config.text_config
    obstacles = [what for what, found in _obstacles(config).items() if found]
    if obstacles:
        raise ValueError(f"the transformers layout cannot hold {', '.join(obstacles)}; keep the boson layout")
    return {name: getattr(text, name) for name in _LLAMA} | {
        "architectures": ["HiggsAudioV2ForConditionalGeneration"],
        "model_type": "higgs_audio_v2",
        "rope_parameters": {"rope_type": "default", **(text.rope_scaling or {}), "rope_theta": text.rope_theta},
        "tie_word_embeddings": False,  # the text head is a tensor of its own
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": _token_id(tokenizer, "<|eot_id|>"),
        "pad_token_id": config.pad_token_id,
        "num_codebooks": config.audio_num_codebooks,
        "codebook_size": config.audio_codebook_size + 2,
        "audio_token_id": config.audio_out_token_idx,
        "audio_bos_token_id": config.audio_out_bos_token_id,
        "audio_delay_token_id": _token_id(tokenizer, _delay_token(tokenizer)),
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "dtype": str(config.torch_dtype or "float32").removeprefix("torch."),
    }


def processor_config(config: HiggsAudioConfig, tokenizer: PreTrainedTokenizerBase) -> dict:
    """processor_config.json of the newer layout, for a base that has none: what `AutoProcessor` makes tokenizer and codec of."""
    samples = {"sampling_rate": 24000, "feature_size": 1, "hop_length": 1, "padding_side": "right", "padding_value": 0.0}
    return {
        "processor_class": "HiggsAudioV2Processor",
        "feature_extractor": {"feature_extractor_type": "DacFeatureExtractor", "return_attention_mask": True, **samples},
        "audio_tokenizer": {"audio_tokenizer_class": "HiggsAudioV2TokenizerModel", "audio_tokenizer_name_or_path": CODEC},
        "audio_token": "<|AUDIO_OUT|>",
        "audio_bos_token": "<|audio_out_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "audio_delay_token": _delay_token(tokenizer),
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
    }


def generation_config(layout: Layout, config: HiggsAudioConfig, tokenizer: PreTrainedTokenizerBase) -> dict:
    """generation_config.json for a base that has none of this layout; sampling as in the official examples."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": config.pad_token_id}
    if layout == "boson":
        return ids | {"eos_token_id": tokenizer.eos_token_id}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    repetition = {"ras_win_len": 7, "ras_win_max_num_repeat": 2}
    return ids | {"eos_token_id": _token_id(tokenizer, "<|eot_id|>")} | sampling | repetition


def _obstacles(config: HiggsAudioConfig) -> dict[str, bool]:
    """What the newer class does not support, and whether this checkpoint has it."""
    text = config.text_config
    return {
        "an audio tower": not config.skip_audio_tower,
        "layers without an audio FFN": (config.audio_dual_ffn_layers or []) != list(range(text.num_hidden_layers)),
        "averaged audio embeddings": config.audio_embed_avg,
        "codes without the delay pattern": not config.use_delay_pattern,
        "an audio embedding projector": config.use_audio_out_embed_projector,
        "attention of its own for audio": bool(config.use_audio_out_self_attention),
        "a decoder projection": config.audio_decoder_proj_num_layers > 0,
        "a text model that is not a Llama": text.model_type != "llama",
    }


def _delay_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Without the usual one in the tokenizer, <|AUDIO|> serves as one: the newer class treats both as audio."""
    return DELAY_TOKEN if DELAY_TOKEN in tokenizer.get_vocab() else "<|AUDIO|>"


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    try:
        return tokenizer.get_vocab()[token]
    except KeyError:
        raise ValueError(f"the tokenizer has no {token}") from None


def _dtype(values: dict) -> str | None:
    return values.get("dtype") or values.get("torch_dtype")
