"""model_patch.py: the patched model equals upstream's, and does what upstream's cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from conftest import CASES, case_samples, make_model
from peft import LoraConfig, PeftModelForCausalLM
from test_collate import TOWER
from torch.utils._python_dispatch import TorchDispatchMode

import loss
import model_patch
import train
from collate import create_collator
from common import PatchError
from config import CHECKPOINTING_MODES
from tools.toys import tiny_config


def run(model, batch, labels):
    """Loss, logits and gradients of one batch, with our loss on whichever model."""
    model.zero_grad()
    output = model(**batch.model_inputs())
    sums = loss.dense_sums(output, batch, labels)
    value = loss.Objective()(sums, *[n.float() for n in batch.num_targets()])
    value.backward()
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    grads = {n: zero[n] if p.grad is None else p.grad for n, p in model.named_parameters()}
    return value.item(), output, grads


def worst(grads, others) -> float:
    """Largest difference of any gradient, relative to the largest gradient of all."""
    scale = max(g.abs().max() for g in others.values())
    return (max((grads[n] - others[n]).abs().max() for n in others) / scale).item()


@pytest.mark.parametrize("case", CASES)
def test_patched_equals_upstream(case, config, tokenizer):
    """float32: measured difference 0 for the loss, the logits and every gradient."""
    model = make_model(config)
    batch = create_collator(config)(case_samples(case, tokenizer))
    labels = loss.LabelSpec.of(config)
    expected_loss, expected, expected_grads = run(model, batch, labels)
    value, output, grads = run(model_patch.patch_for_training(copy.deepcopy(model)), batch, labels)
    assert value == pytest.approx(expected_loss, rel=1e-6)
    real = output.attention_mask.bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.audio_logits, expected.audio_logits, rtol=0, atol=1e-5)
    assert torch.equal(output.expanded_labels, expected.expanded_labels)
    assert worst(grads, expected_grads) < 1e-5


class CountMatmuls(TorchDispatchMode):
    """Counts matrix products while it is active."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora_r", [0, 4])
def test_activation_checkpointing_changes_nothing_but_the_work(lora_r, config, tokenizer):
    """float32: measured difference 0 for the loss and the gradients. "full" repeats the matrix products of a layer in the
    backward pass, "selective" none."""
    batch = create_collator(config)(case_samples("multi-segment", tokenizer))
    labels = loss.LabelSpec.of(config)
    model = model_patch.patch_for_training(make_model(config))
    if lora_r:
        model_patch.add_lora(model, lora_r, 8, 0.0)
        torch.nn.init.normal_(model.layers[0].mlp.up_proj.lora_B["default"].weight)
    found = {}
    for mode in CHECKPOINTING_MODES:
        model_patch.set_activation_checkpointing(model, mode)
        with CountMatmuls() as counter:
            value, _, grads = run(model, batch, labels)
        found[mode] = value, {n: g.clone() for n, g in grads.items()}, counter.count
    for mode in ("full", "selective"):
        assert found[mode][0] == found["none"][0]
        assert worst(found[mode][1], found["none"][1]) < 1e-6
    repeated = 8 + 8 + 6 if lora_r else 8  # ten linear maps, the FFNs' last two of which nobody needs; as many B, and six A
    assert found["full"][2] == found["none"][2] + 3 * repeated
    assert found["selective"][2] == found["none"][2]


def test_generation_is_upstreams(config, tokenizer):
    """With a cache the patched model runs upstream's layers: generated codes are equal."""
    from generate.official import as_prompt, generate_one

    model = make_model(config)
    prompt = case_samples("reference and target", tokenizer)[0]
    prompt.input_ids = prompt.input_ids[: (prompt.input_ids == config.audio_out_token_idx).nonzero()[0, 0]]
    expected = generate_one(model, tokenizer, as_prompt_of(prompt), max_new_tokens=20)
    spoken = generate_one(model_patch.patch_for_training(model), tokenizer, as_prompt_of(prompt), max_new_tokens=20)
    assert expected.delayed and torch.equal(spoken.delayed[0], expected.delayed[0])
    assert as_prompt(prompt, tokenizer).label_ids is None


def as_prompt_of(sample):
    """The sample up to and with <|audio_out_bos|>, so that even an untrained model speaks."""
    import dataclasses

    return dataclasses.replace(
        sample, label_ids=None, audio_ids_concat=sample.audio_ids_concat[:, :6], audio_ids_start=sample.audio_ids_start[:1]
    )


# ---- what upstream cannot do


def test_dtype_error_of_upstream_is_gone(config, tokenizer):
    """Codebook embeddings kept in float32 beside bf16 text embeddings, as autocast makes them on a GPU."""
    model = make_model(config).bfloat16()
    model.audio_codebook_embeddings.float()
    batch = create_collator(config)(case_samples("single", tokenizer))
    with pytest.raises(RuntimeError, match="Index put requires the source and destination dtypes match"):
        model(**batch.model_inputs())
    output = model_patch.patch_for_training(model)(**batch.model_inputs())
    assert output.logits.dtype == torch.bfloat16 and torch.isfinite(output.audio_logits).all()


def test_dual_ffn_keeps_the_residuals_dtype(config, tokenizer):
    """An audio FFN that computes in float32 (a master copy, an adapter) beside a bf16 residual. Upstream survives this too,
    because its in-place sum casts; gathering and joining both halves, as here, would promote the residual to float32."""
    model = make_model(config).bfloat16()
    for layer in model.layers:
        layer.audio_post_attention_layernorm.float()  # float32 weight times bf16 states: the FFN's input is float32
        layer.audio_mlp.float()
    inputs = create_collator(config)(case_samples("single", tokenizer)).model_inputs()
    expected = model(**inputs)
    output = model_patch.patch_for_training(model)(**inputs)
    assert output.logits.dtype == torch.bfloat16
    # Upstream rounds after its in-place sum, we before: measured difference 0.02 in values up to 2.3.
    torch.testing.assert_close(output.audio_logits, expected.audio_logits, rtol=0, atol=0.1)


def test_labels_injected_by_peft_are_stripped(config, tokenizer):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    batch = create_collator(config)(case_samples("single", tokenizer))
    inputs = batch.model_inputs()
    model = make_model(config)
    with pytest.raises(TypeError, match="labels"):
        PeftModelForCausalLM(copy.deepcopy(model), lora)(**inputs, labels=batch.label_ids)
    output = PeftModelForCausalLM(model_patch.patch_for_training(model), lora)(**inputs, labels=batch.label_ids)
    assert output.expanded_labels is not None, "label_ids must still arrive"
    assert output.loss is None
    with pytest.raises(TypeError, match="lables"):
        model(**inputs, lables=batch.label_ids)


def test_every_parameter_gets_a_gradient_without_audio(config, tokenizer):
    """A text-only batch leaves the codebook embeddings out of upstream's graph; FSDP ranks would disagree."""
    batch = create_collator(config)(case_samples("text-only", tokenizer))
    labels = loss.LabelSpec.of(config)

    def without_grad(model):
        sums = loss.dense_sums(model(**batch.model_inputs()), batch, labels)
        (sums.text.nats.sum() + sums.audio.nats.sum()).backward()
        return [n for n, p in model.named_parameters() if p.grad is None]

    model = make_model(config)
    assert without_grad(copy.deepcopy(model)) == ["audio_codebook_embeddings.weight"]
    assert without_grad(model_patch.patch_for_training(model)) == []
    assert model.audio_codebook_embeddings.weight.grad.abs().max() == 0


@pytest.mark.parametrize("average", [False, True])
def test_codes_are_embedded_as_upstream_does(average, tokenizer):
    """float32, though [K, N, D] never exists: the sum to the bit; the mean, and gradients, to 1.2e-7 of the largest."""
    found = []
    for patch in (lambda model: model, model_patch.patch_for_training):
        model = patch(make_model(tiny_config(tokenizer, audio_embed_avg=average)))
        codes = torch.randint(0, 66, (8, 50), generator=torch.Generator().manual_seed(0))
        rows = model._embed_audio_ids(codes)
        (rows * rows.detach().cos()).sum().backward()
        found.append((rows.detach(), model.audio_codebook_embeddings.weight.grad))
    assert average or torch.equal(found[0][0], found[1][0])
    for ours, upstreams in zip(*found):
        torch.testing.assert_close(ours, upstreams, rtol=0, atol=2e-7 * upstreams.abs().max().item())


# ---- the patches themselves


def test_patching_is_idempotent(config):
    model = make_model(config)
    assert model_patch.patch_for_training(model) is model_patch.patch_for_training(model)
    assert isinstance(model, HiggsAudioModel) and type(model) is not HiggsAudioModel


def test_unknown_upstream_source_is_refused(config, monkeypatch):
    def forward(self):
        """Not the forward these patches were written for."""

    monkeypatch.setattr(model_patch, "UPSTREAM_SOURCES", {forward: model_patch.UPSTREAM_SOURCES[HiggsAudioModel.forward]})
    model = make_model(config)
    with pytest.raises(PatchError, match=r"boson-multimodal==0\.1\.1"):
        model_patch.patch_for_training(model)
    assert type(model) is HiggsAudioModel


def test_patching_something_else_is_refused():
    with pytest.raises(PatchError, match="HiggsAudioModel"):
        model_patch.patch_for_training(torch.nn.Linear(1, 1))


# ---- what trains


def lora_names(model) -> set[str]:
    return {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}


def test_lora_defaults_reach_attention_and_both_ffns(config):
    model = model_patch.patch_for_training(make_model(config))
    model_patch.add_lora(model, r=4, alpha=8, dropout=0.0)
    ffn = {f"{kind}.{part}_proj" for kind in ("mlp", "audio_mlp") for part in ("gate", "up", "down")}
    expected = {f"self_attn.{part}_proj" for part in "qkvo"} | ffn
    assert lora_names(model) == {f"layers.{i}.{name}" for i in range(3) for name in expected}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {f"layers.{i}.self_attn.q_proj" for i in range(3)}),
        (["mlp"], {f"layers.{i}.mlp.{p}_proj" for i in range(3) for p in ("gate", "up", "down")}),
        (
            [r"layers\.1\.audio_mlp\.up_proj", "audio_lm_head"],
            {"layers.1.audio_mlp.up_proj", "audio_decoder_proj.audio_lm_head"},
        ),
    ],
)
def test_lora_targets(targets, expected, config):
    model = make_model(config)
    model_patch.add_lora(model, r=4, alpha=8, dropout=0.0, targets=targets)
    assert lora_names(model) == expected


def test_lora_leaves_the_audio_tower_alone_unless_named(tokenizer):
    """The tower's layers have a q_proj too."""
    tower = {"audio_encoder_config": dict(TOWER), "skip_audio_tower": False, "encode_whisper_embed": True}
    model = make_model(tiny_config(tokenizer, **tower))
    model_patch.add_lora(model, r=4, alpha=8, dropout=0.0, targets=["q_proj"])
    assert lora_names(model) == {f"layers.{i}.self_attn.q_proj" for i in range(3)}
    model = make_model(tiny_config(tokenizer, **tower))
    model_patch.add_lora(model, r=4, alpha=8, dropout=0.0, targets=[r"audio_tower\.layers\.0\.self_attn\.q_proj"])
    assert lora_names(model) == {"audio_tower.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("pattern", ["qproj", "lp", "("])
def test_patterns_that_match_nothing_are_errors(pattern, config):
    with pytest.raises(PatchError, match="pattern"):
        model_patch.add_lora(make_model(config), r=4, alpha=8, dropout=0.0, targets=["q_proj", pattern])
    with pytest.raises(PatchError, match="pattern"):
        model_patch.freeze(make_model(config), [pattern])


def test_a_batch_without_audio_leaves_no_graph_behind(config, tokenizer):
    """The model can be copied after any batch; a tensor of the graph kept in it could not."""
    model = model_patch.patch_for_training(make_model(config)).train()
    for case in ("text-only", "single"):
        batch = create_collator(config)(case_samples(case, tokenizer))
        train.forward(model, batch, loss.LabelSpec.of(config))
        copy.deepcopy(model)


def test_frozen_stays_frozen(config, tokenizer):
    model = model_patch.patch_for_training(make_model(config))
    frozen = model_patch.freeze(model, ["embed_tokens", "mlp", r"layers\.0"])
    assert "layers.1.mlp.up_proj.weight" in frozen and "layers.1.audio_mlp.up_proj.weight" not in frozen
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, create_collator(config)(case_samples("padded", tokenizer)), loss.LabelSpec.of(config))
    optimizer.step()
    unchanged = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert unchanged == set(frozen)
    with pytest.raises(PatchError, match="nothing to train"):
        model_patch.freeze(model, ["layers", "norm", "audio_decoder_proj", "audio_codebook_embeddings"])


# ---- the published size


def test_published_checkpoint_on_meta():
    """The published configuration has 5,771,283,456 parameters in 397 tensors."""
    config = HiggsAudioConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(28)),
        audio_ffn_hidden_size=3072,
        audio_ffn_intermediate_size=8192,
        skip_audio_tower=True,
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
        use_delay_pattern=True,
        audio_num_codebooks=8,
    )
    model = model_patch.patch_for_training(model_patch.build_on_meta(config))
    assert sum(p.numel() for p in model.parameters()) == 5_771_283_456
    assert len(list(model.parameters())) == 397
    model_patch.add_lora(model, r=16, alpha=32, dropout=0.0)
    assert len(lora_names(model)) == 28 * 10
