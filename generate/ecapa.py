"""The speaker verification model of Seed-TTS-eval's SIM: WavLM-large with an ECAPA-TDNN head, wavlm_large_finetune.pth.

The body is WavLM of transformers under other names; the head is here, its modules named as in the file. Sizes are the file's.

Legend: B batch, D width of the body, C channels of the head, T frames.
source: microsoft/UniSpeech, downstreams/speaker_verification; arXiv:2005.07143, arXiv:2110.13900
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WavLMConfig, WavLMModel

SCALE = 8  # groups of channels in a Res2 block
BODY = "feature_extract.model."
NAMES = (  # of the file's body -> of transformers
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^mask_emb$", "masked_spec_embed"),
    (r"pos_conv\.0\.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"pos_conv\.0\.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"pos_conv\.0\.", "pos_conv_embed.conv."),
    (r"self_attn\.grep_linear", "attention.gru_rel_pos_linear"),
    (r"self_attn\.grep_a", "attention.gru_rel_pos_const"),
    (r"self_attn\.relative_attention_bias", "attention.rel_attn_embed"),
    (r"self_attn_layer_norm", "layer_norm"),
    (r"self_attn\.", "attention."),
    (r"fc1\.", "feed_forward.intermediate_dense."),
    (r"fc2\.", "feed_forward.output_dense."),
)


def load_ecapa(path: Path) -> Ecapa:
    """raises: OSError, ValueError or what torch.load raises for a file of anything else"""
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    body = {name.removeprefix(BODY): tensor for name, tensor in state.items() if name.startswith(BODY)}
    for before, after in NAMES:
        body = {re.sub(before, after, name): tensor for name, tensor in body.items()}
    head = {name: tensor for name, tensor in state.items() if not name.startswith(BODY)}
    weights = {f"body.{name}": tensor for name, tensor in body.items()} | head
    model = Ecapa(_body_config(body), head)
    missing = sorted(model.load_state_dict(weights, strict=False).missing_keys)
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, first {missing[0]}")
    return model.eval()


def _body_config(body: dict[str, Tensor]) -> WavLMConfig:
    """The published model's settings, with the sizes of these weights."""
    convs = [tensor for name, tensor in body.items() if re.fullmatch(r"feature_extractor\.conv_layers\.\d+\.conv\.weight", name)]
    position = body["encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
    D, _ = body["feature_projection.projection.weight"].shape
    return WavLMConfig(
        hidden_size=D,
        num_hidden_layers=len([name for name in body if name.endswith("attention.k_proj.weight")]),
        num_attention_heads=body["encoder.layers.0.attention.gru_rel_pos_const"].shape[1],
        intermediate_size=len(body["encoder.layers.0.feed_forward.intermediate_dense.weight"]),
        conv_dim=[len(conv) for conv in convs],
        conv_kernel=[conv.shape[2] for conv in convs],
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=position.shape[2],
        num_conv_pos_embedding_groups=D // position.shape[1],
        num_buckets=len(body["encoder.layers.0.attention.rel_attn_embed.weight"]),
    )


class ConvReluNorm(nn.Module):
    def __init__(self, weight: Tensor, padding: int = 0):
        super().__init__()
        out_channels, in_channels, width = weight.shape
        self.conv = nn.Conv1d(in_channels, out_channels, width, padding=padding)
        self.bn = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(functional.relu(self.conv(x)))


class Res2(nn.Module):
    """Convolutions of groups of channels, each of which also gets the result of the one before; the last group stays."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        width = channels // SCALE
        make = lambda: nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)  # noqa: E731
        self.convs = nn.ModuleList(make() for _ in range(SCALE - 1))
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(SCALE - 1))

    def forward(self, x: Tensor) -> Tensor:
        *groups, last = x.chunk(SCALE, dim=1)
        results, before = [], 0
        for group, conv, norm in zip(groups, self.convs, self.bns):
            before = norm(functional.relu(conv(group + before)))
            results.append(before)
        return torch.cat([*results, last], dim=1)


class SqueezeExcite(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        inner, channels = weight.shape
        self.linear1, self.linear2 = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear2(functional.relu(self.linear1(x.mean(dim=2)))))[..., None]


class Block(nn.Module):
    def __init__(self, weights: dict[str, Tensor], name: str, dilation: int):
        super().__init__()
        self.Conv1dReluBn1 = ConvReluNorm(weights[f"{name}.Conv1dReluBn1.conv.weight"])
        self.Res2Conv1dReluBn = Res2(len(weights[f"{name}.Conv1dReluBn1.conv.weight"]), dilation)
        self.Conv1dReluBn2 = ConvReluNorm(weights[f"{name}.Conv1dReluBn2.conv.weight"])
        self.SE_Connect = SqueezeExcite(weights[f"{name}.SE_Connect.linear1.weight"])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.SE_Connect(self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x))))


class AttentivePooling(nn.Module):
    """[B, C, T] -> [B, 2 C]: mean and standard deviation over frames, weighted by attention."""

    def __init__(self, weight: Tensor):
        super().__init__()
        inner, channels, _ = weight.shape
        self.linear1, self.linear2 = nn.Conv1d(channels, inner, 1), nn.Conv1d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.linear2(torch.tanh(self.linear1(x))).softmax(dim=2)
        mean = (weights * x).sum(dim=2)
        variance = (weights * x**2).sum(dim=2) - mean**2
        return torch.cat([mean, variance.clamp(min=1e-9).sqrt()], dim=1)


class Ecapa(nn.Module):
    """Mono samples at 16 kHz [B, samples] -> speaker embeddings [B, size]. weights: the head's, for their shapes"""

    def __init__(self, config: WavLMConfig, weights: dict[str, Tensor]):
        super().__init__()
        self.body = WavLMModel(config)
        self.feature_weight = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.layer1 = ConvReluNorm(weights["layer1.conv.weight"], padding=2)
        self.layer2, self.layer3, self.layer4 = (Block(weights, f"layer{n}", dilation=n) for n in (2, 3, 4))
        out_channels, in_channels, _ = weights["conv.weight"].shape
        self.conv = nn.Conv1d(in_channels, out_channels, 1)
        self.pooling = AttentivePooling(weights["pooling.linear1.weight"])
        self.bn = nn.BatchNorm1d(2 * out_channels)
        self.linear = nn.Linear(2 * out_channels, len(weights["linear.weight"]))

    def forward(self, clip: Tensor) -> Tensor:
        states = self.body(functional.layer_norm(clip, clip.shape[1:]), output_hidden_states=True).hidden_states
        mixed = torch.einsum("n,nbtd->bdt", self.feature_weight.softmax(dim=0), torch.stack(states)) + 1e-6
        out1 = self.layer1(functional.instance_norm(mixed))
        out2 = self.layer2(out1)
        out3 = self.layer3(out2)
        out4 = self.layer4(out3)
        pooled = self.pooling(functional.relu(self.conv(torch.cat([out2, out3, out4], dim=1))))
        return self.linear(self.bn(pooled))
