"""What training needs changed in the upstream model, applied from outside.

`patch_for_training(model)` turns a `HiggsAudioModel` into the trainable subclass below by assigning `__class__`, so
the weights, the state-dict names and `isinstance` stay as they were, and a deep copy works.

  upstream method (boson_multimodal/model/higgs_audio/modeling_higgs_audio.py)        why training differs
  -----------------------------------------------------------------------------------------------------------------
  HiggsAudioModel.forward                 PEFT wrappers and trainer loops inject `labels` and friends: stripped here.
  HiggsAudioModel._embed_audio_ids        returns the dtype of the codebook embeddings, float32 under autocast; the
                                          merge then fails ("Index put requires the source and destination dtypes
                                          match"). Here: always the dtype that is computed in, and without [K, N, D],
                                          which upstream writes and sums: the same numbers in float32.
  HiggsAudioModel._apply_audio_tower      a batch without audio leaves the tower out of the backward graph, so FSDP
  (and _embed_audio_ids)                  ranks would disagree on what to reduce. Here: kept in the graph by a sum over
                                          nothing, which is exactly 0 and has exactly zero gradients.
  HiggsAudioModel._update_causal_mask     a batch with any padding gets a float mask [B, 1, S, S] and leaves the kernels'
                                          causal path. Here: no mask, for no position ever sees padding.
  HiggsAudioModel._forward_core           the positions of text and of audio are looked up (a device synchronisation)
  HiggsAudioDualFFNDecoderLayer.forward   four times in every layer, both norms run on all positions, and padding runs
                                          through everything. Here: the layers work on the real positions alone, text
                                          before audio, which are looked up once per forward or come with the batch
                                          (`collate.Packing`). The result takes the residual's dtype, and the layer can
                                          recompute its activations in the backward pass, which upstream ignores.
  HiggsAudioDecoderProjector.forward      computes logits of every position. Here also: scores supervised positions only,
  (audio_head.py)                         during this call, in which the sharded weights are whole.

Inference with a cache runs the upstream layers untouched.

Legend: B batch, S positions after expansion, T real positions in the batch, K codebooks, N audio positions, D width.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import warnings
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from boson_multimodal.model.higgs_audio.audio_head import HiggsAudioDecoderProjector
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioDualFFNDecoderLayer
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from collate import Layout, Packing, Voices
from common import PatchError
from config import CHECKPOINTING_MODES, LORA_DEFAULT_TARGETS
from layers.nf4 import is_quantized, own_part
from layers.packed import TrainableDualFFNDecoderLayer
from loss import Scores, pool_voices, score_head

# What PEFT task wrappers, `transformers.Trainer` and home-made loops add to a call. `label_ids` is not one of them: it
# is upstream's own argument and makes `expanded_labels` appear. Any other unknown argument stays an error.
INJECTED_KWARGS = frozenset({"labels", "task_ids", "num_items_in_batch", "return_loss"})

# sha256 of each upstream function that the subclasses replace or rely on, boson-multimodal 0.1.1.
UPSTREAM_SOURCES = {
    HiggsAudioModel.forward: "6001ef61c2f31e68",
    HiggsAudioModel._update_causal_mask: "665355ead1faf570",
    HiggsAudioModel._forward_core: "50f95f8ada0179bd",
    HiggsAudioModel._embed_audio_ids: "9abc216fa2a10048",
    HiggsAudioModel._apply_audio_tower: "b3cd752abce9df82",
    HiggsAudioDualFFNDecoderLayer.forward: "4664d928bcf8de4e",
}


def padded_layout(attended: Tensor, is_audio: Tensor) -> tuple[Layout, Tensor]:
    """The layout of padded rows on the device, which is asked once, and where the sorted positions are: [T] int64 of B * S.

    attended, is_audio: [B, S] bool
    """
    kinds = torch.where(attended, is_audio.long(), 2).flatten()  # text, audio, padding
    num_text, *lengths = torch.cat([(kinds == 0).sum()[None], attended.sum(1)]).tolist()
    flat = torch.sort(kinds, stable=True).indices[: sum(lengths)]
    perm = (attended.flatten().cumsum(0) - 1)[flat]
    inverse_perm = torch.empty_like(flat).scatter_(0, perm, torch.arange(len(flat), device=flat.device))
    cu_seqlens = functional.pad(attended.sum(1).cumsum(0), (1, 0)).int()
    return Layout(num_text, perm, inverse_perm, lengths, cu_seqlens), flat


class TrainableDecoderProjector(HiggsAudioDecoderProjector):
    """The heads. Sharded weights are whole only during the forward pass, so supervised positions are scored in it."""

    def forward(self, hidden_states, *args, audio_states: Tensor | None = None, packing: Packing | None = None, **kwargs):
        """With a packing: the text's and the audio's `loss.Scores`, from hidden states [n, D] of what predicts them."""
        if packing is None:
            return super().forward(hidden_states, *args, **kwargs)
        text = score_head(hidden_states, self.text_lm_head, packing.text)
        return text, score_head(audio_states, self.audio_lm_head, packing.audio)


class PackedOutput(NamedTuple):
    """What the model returns of a packed batch; part of the graph."""

    text: Scores
    audio: Scores
    voices: tuple[Tensor, Tensor] | None  # of `loss.pool_voices`, where the batch has voices


class TrainableHiggsAudioModel(HiggsAudioModel):
    """`HiggsAudioModel` with the patches of this module; make one with `patch_for_training`."""

    @property
    def can_pack(self) -> bool:
        """Whether the model has nothing but what `_forward_packed` computes."""
        return self.audio_tower is None and self._has_plain_layers

    @property
    def _has_plain_layers(self) -> bool:
        """Whether the layers can work on the real positions alone."""
        is_plain = all(isinstance(layer, TrainableDualFFNDecoderLayer) for layer in self.layers)
        has_extra = self.config.audio_decoder_proj_num_layers or self.config.text_config.attention_dropout
        return is_plain and not has_extra

    def _forward_packed(self, batch: dict, packing: Packing, voices: Voices | None) -> PackedOutput:
        """Embed, run the layers on the packed positions, and score what is supervised; see `collate.Packing`."""
        codes, codes_in = batch["audio_out_ids"], batch["audio_in_ids"]
        if codes_in is not None and codes_in.shape[-1] > 0:
            codes = torch.cat([codes_in, codes], dim=1)
        hidden = torch.cat([self.embed_tokens(packing.text_ids), self._embed_codes(codes)])
        cos, sin = (table[0] for table in self.rotary_emb(hidden, packing.position_ids[None]))
        for layer in self.layers:
            hidden = layer(hidden, layout=packing.layout, position_embeddings=(cos, sin))

        def normed(rows: Tensor) -> Tensor:
            return self.norm(hidden.index_select(0, rows))

        states = normed(packing.text.rows), normed(packing.audio.rows)
        text, audio = self.audio_decoder_proj(states[0], audio_states=states[1], packing=packing)
        return PackedOutput(text, audio, voices and pool_voices(normed, voices))

    @functools.wraps(HiggsAudioModel.forward)  # generate() reads the names of the arguments from the signature
    def forward(self, *args, return_dict: bool | None = None, packing: Packing | None = None, voices=None, **kwargs):
        if packing is not None:
            return self._forward_packed(kwargs, packing, voices)
        self._unused: list[Tensor] = []
        kwargs = {name: value for name, value in kwargs.items() if name not in INJECTED_KWARGS}
        output = super().forward(*args, return_dict=True, **kwargs)
        if torch.is_grad_enabled():
            for zero in self._unused:
                output.audio_logits = output.audio_logits + zero
        self._unused = []
        return output if return_dict or (return_dict is None and self.config.use_return_dict) else output.to_tuple()

    def _embed_audio_ids(self, audio_ids: Tensor) -> Tensor:
        """audio_ids: [K, N]; returns [N, D]"""
        embed = self._embed_codes(audio_ids)
        if embed.shape[0] == 0:
            self._unused.append(embed.sum())
        return embed

    def _embed_codes(self, codes: Tensor) -> Tensor:
        """Each position's K embeddings together, in the dtype that is computed in; `embed_tokens` is sharded again by now.

        codes: [K, N]; returns [N, D]
        """
        first = torch.arange(len(codes), device=codes.device) * self.audio_codebook_size  # rows of each codebook
        mode = "mean" if self.config.audio_embed_avg else "sum"
        embed = functional.embedding_bag((codes + first[:, None]).T, self.audio_codebook_embeddings.weight, mode=mode)
        embed = self.audio_out_embed_projector(embed) if self.use_audio_out_embed_projector else embed
        return embed.to(self.norm.weight.dtype)

    def _apply_audio_tower(self, audio_features, audio_feature_attention_mask):
        # Without gradients upstream skips the tower for a batch without audio; sharded, every rank has to enter it.
        with torch.set_grad_enabled(torch.is_grad_enabled() or isinstance(self, FSDPModule)):
            embed, lengths = super()._apply_audio_tower(audio_features, audio_feature_attention_mask)
        if embed is not None and embed.shape[0] == 0:
            self._unused.append(embed.sum())
        return embed, lengths

    def _update_causal_mask(self, attention_mask, input_tensor, cache_position, past_key_values, output_attentions):
        """[B, S] as it came, which is how `_forward_core` knows that it is to work on the real positions alone."""
        if self._has_plain_layers and past_key_values is None and not output_attentions:
            return attention_mask
        return super()._update_causal_mask(attention_mask, input_tensor, cache_position, past_key_values, output_attentions)

    def _forward_core(self, *, hidden_states, causal_mask, output_hidden_states, **kwargs):
        if causal_mask is None or causal_mask.ndim != 2:
            states = {"hidden_states": hidden_states, "causal_mask": causal_mask}
            return super()._forward_core(**states, output_hidden_states=output_hidden_states, **kwargs)
        layout, flat = padded_layout(causal_mask.bool(), kwargs["audio_discrete_codes_mask"])
        packed = flat.index_select(0, layout.inverse_perm)
        tables = self.rotary_emb(hidden_states, kwargs["position_ids"].flatten()[None, packed])
        position_embeddings = [table[0] for table in tables]
        hidden, seen = hidden_states.flatten(0, 1).index_select(0, flat), []
        for layer in self.layers:
            if output_hidden_states:
                seen.append(_as_rows(hidden, flat, hidden_states))
            hidden = layer(hidden, layout=layout, position_embeddings=position_embeddings)
        return _as_rows(hidden, flat, hidden_states), tuple(seen) if output_hidden_states else None, None


def _as_rows(hidden: Tensor, flat: Tensor, like: Tensor) -> Tensor:
    """hidden: [T, D]; returns [B, S, D], zero where there is padding."""
    return torch.zeros_like(like).flatten(0, 1).index_copy(0, flat, hidden).view_as(like)


def patch_for_training(model: HiggsAudioModel) -> HiggsAudioModel:
    """Apply every patch of this module in place and return the model; a second call changes nothing.

    raises: PatchError if the installed boson-multimodal is not the version the patches were written for, or `model`
            is not a HiggsAudioModel.
    """
    if isinstance(model, TrainableHiggsAudioModel):
        return model
    if type(model) is not HiggsAudioModel:
        raise PatchError(f"patch_for_training expects a HiggsAudioModel, got {type(model).__name__}")
    check_upstream()
    model.__class__ = TrainableHiggsAudioModel
    for layer in model.layers:
        # Fast-forward layers and separate audio attention do not occur in the published checkpoint; they stay upstream's.
        if type(layer) is HiggsAudioDualFFNDecoderLayer and not layer.fast_forward and not layer.use_audio_attention:
            layer.__class__ = TrainableDualFFNDecoderLayer
    model.audio_decoder_proj.__class__ = TrainableDecoderProjector
    return model


def check_upstream() -> None:
    """Raise PatchError when an upstream function is not the one these patches were written for."""
    changed = [f.__qualname__ for f, digest in UPSTREAM_SOURCES.items() if source_digest(f) != digest]
    if changed:
        problem = f"boson-multimodal's {', '.join(changed)} differ from version 0.1.1, which the training patches replace"
        remedy = "Install boson-multimodal==0.1.1, or review model_patch.py against the new source and update its digests"
        raise PatchError(f"{problem}. {remedy}.")


def source_digest(function) -> str:
    """sha256 of a function's source text, 16 hexadecimal digits."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


def set_activation_checkpointing(model: HiggsAudioModel, mode: str) -> None:
    """Choose what each decoder layer keeps for the backward pass.

    mode: "none" keeps everything, "full" only the layer's input, "selective" the results of matrix products and of
          attention (the rest, cheap to compute, is recomputed).
    """
    if mode not in CHECKPOINTING_MODES:
        raise PatchError(f"activation checkpointing {mode!r} is not one of {', '.join(CHECKPOINTING_MODES)}")
    layers = [layer for layer in model.layers if isinstance(layer, TrainableDualFFNDecoderLayer)]
    if mode != "none" and len(layers) < len(model.layers):
        raise PatchError("activation checkpointing needs a model whose decoder layers are all plain dual-FFN layers")
    for layer in layers:
        layer.checkpointing = mode


def compile_layers(model: HiggsAudioModel) -> None:
    """Run the decoder layers through `torch.compile`, except for attention; one graph serves all layers and lengths."""
    if not all(isinstance(layer, TrainableDualFFNDecoderLayer) for layer in model.layers):
        raise PatchError("--compile needs a model whose decoder layers are all plain dual-FFN layers")
    for layer in model.layers:
        layer.compiled = True


# ---------------------------------------------------------------------------------------------------------------------
# What trains: LoRA and freezing


def _matches(pattern: str, name: str) -> bool:
    """True if the regular expression covers whole dotted components of `name`: "mlp" is not in "audio_mlp"."""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


def _select(patterns: Iterable[str], names: Iterable[str], what: str) -> list[str]:
    """The names that match any of the patterns, in order; PatchError for a pattern that is invalid or matches nothing."""
    names, chosen = list(names), set()
    for pattern in patterns:
        try:
            hits = [name for name in names if _matches(pattern, name)]
        except re.error as error:
            raise PatchError(f"{what} pattern {pattern!r} is not a regular expression: {error}") from None
        if not hits:
            examples = ", ".join(names[:: max(1, len(names) // 6)][:6])
            raise PatchError(f"{what} pattern {pattern!r} matches nothing; names look like: {examples}")
        chosen.update(hits)
    return [name for name in names if name in chosen]


def add_lora(
    model, r: int, alpha: float, dropout: float, targets: Iterable[str] = LORA_DEFAULT_TARGETS, use_rslora=False, use_dora=False
) -> LoraConfig:
    """Freeze the model and insert LoRA adapters into the linear layers whose names match `targets`.

    targets: regular expressions over whole components of module names; the default covers attention and both the text
             and the audio FFN. The audio tower takes part only where a pattern names it.
    returns: the PEFT configuration, for `adapter_config.json`.
    raises:  PatchError if a pattern matches no linear layer.
    """
    targets = list(targets)
    use_tower = any("audio_tower" in pattern for pattern in targets)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = [name for name in linears if use_tower or not name.startswith("audio_tower.")]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_select(targets, linears, "LoRA target"),
        exclude_modules=None if use_tower or model.audio_tower is None else r"audio_tower\..*",
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    on_meta = next(model.parameters()).is_meta
    model.requires_grad_(False)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)
    return config


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Stop the parameters whose names match a pattern from training; returns their names.

    raises: PatchError if a pattern matches no parameter, or nothing is left to train.
    """
    frozen = _select(patterns, [name for name, _ in model.named_parameters()], "freeze")
    parameters = dict(model.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise PatchError("freezing leaves nothing to train")
    return frozen


def set_training_dtypes(model: nn.Module, frozen_dtype: torch.dtype) -> None:
    """float32 master weights for whatever trains, `frozen_dtype` for the rest; call on meta, before sharding."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Construction and sharding


def build_on_meta(config: HiggsAudioConfig) -> HiggsAudioModel:
    """A `HiggsAudioModel` without storage; patch, adapt and shard it, then call `materialize`."""
    with torch.device("meta"):
        return HiggsAudioModel(config)


def materialize(model: nn.Module, device: torch.device, cpu_offload: bool = False) -> None:
    """Give a meta model storage on `device`, or its shards on the host; weights are undefined until loaded, rotary tables
    are computed."""
    for parameter in filter(is_quantized, model.parameters()):  # torchao's empty_like leaves these where they are
        mine = own_part(parameter)
        mine.nf4, mine.scaler_mean = (torch.empty_like(t, device=device) for t in (mine.nf4, mine.scaler_mean))
    model.to_empty(device="cpu" if cpu_offload else device)
    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding):  # its only buffer is computed, never stored
            inv_freq, module.attention_scaling = module.rope_init_fn(module.config, device)
            module.inv_freq = module.original_inv_freq = inv_freq
    others = [n for n, b in model.named_buffers() if not n.endswith("inv_freq")]
    assert not others, f"buffers without a value: {others}"


def shard(model: HiggsAudioModel, mesh: DeviceMesh, param_dtype: torch.dtype | None, cpu_offload: bool = False) -> None:
    """The whole FSDP2 plan: word embeddings, each decoder layer, each layer of the audio tower, heads, then the rest at the root;
    and what is prefetched.

    mesh:        1-D (shard), or 2-D (replicate, shard) for HSDP.
    param_dtype: what is gathered and computed in; gradients are always reduced in float32.
    cpu_offload: shards, their gradients and so the optimizer stay on the host.
    """
    # FSDP warns of views among the outputs (audio logits, in float32); nothing writes to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)}
    if cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    elif mesh.size() == 1:  # alone, gathering would only copy what is computed in as it is
        settings["ignored_params"] = {p for p in model.parameters() if not p.requires_grad or p.dtype == param_dtype}
    tower_layers = model.audio_tower.layers if model.audio_tower is not None else ()
    for module in (model.embed_tokens, *tower_layers, *model.layers):
        fully_shard(module, **settings)
    fully_shard(model.audio_decoder_proj, reshard_after_forward=False, **settings)  # the backward pass begins with it
    fully_shard(model, **settings)
    if not can_prefetch(mesh):
        return
    model.set_modules_to_forward_prefetch([model.embed_tokens, model.layers[0]])
    for module, following in pairwise([*model.layers, model.audio_decoder_proj]):
        module.set_modules_to_forward_prefetch([following])  # on its way while this one computes
        following.set_modules_to_backward_prefetch([module])


def can_prefetch(mesh: DeviceMesh) -> bool:
    """Whether weights travel while something computes; elsewhere they would merely take memory."""
    return mesh.device_type == "cuda"


def reshard(model: nn.Module) -> None:
    """Give up gathered weights, which a forward pass without a backward one leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def main() -> None:
    """What of upstream is patched, and whether it is what the patches were written for."""
    check_upstream()
    for function, digest in UPSTREAM_SOURCES.items():
        print(f"{function.__qualname__:50} source {digest}: as expected")


if __name__ == "__main__":
    main()
