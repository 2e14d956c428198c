"""collate.py: equal to the official collator where that works, right where it does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.model.higgs_audio.utils import build_delay_pattern_mask
from conftest import CASES, case_samples, make_model, make_sample
from transformers import WhisperFeatureExtractor, WhisperProcessor

from collate import create_collator
from common import CollateError
from generate.official import official_collator
from tools import toys as demo

TOWER = {
    "model_type": "higgs_audio_encoder",
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "max_source_positions": 50,  # a window of one second
    "init_std": 0.05,
}


@pytest.fixture()
def whisper_config(tokenizer):
    return demo.tiny_config(tokenizer, audio_encoder_config=dict(TOWER), skip_audio_tower=False, encode_whisper_embed=True)


def official(config, **kwargs) -> HiggsAudioSampleCollator:
    collator = official_collator(config)
    collator.round_to = 8
    for name, value in kwargs.items():
        setattr(collator, name, value)
    return collator


def assert_equal_batches(ours, theirs, but: tuple[str, ...] = ()):
    for f in dataclasses.fields(HiggsAudioBatchInput):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if f.name in but:
            continue
        assert (a is None) == (b is None), f.name
        if a is not None:
            assert torch.equal(a, b) and a.dtype == b.dtype, f.name


def copies(samples):
    return [dataclasses.replace(s, label_ids=s.label_ids.clone()) for s in samples]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_collator(case, config, tokenizer):
    samples = case_samples(case, tokenizer)
    ours = create_collator(config)(samples)
    # Upstream's group_loc holds one entry per row instead of one per clip; without audio its empty tensors lack rows.
    differing = ("audio_out_ids_start_group_loc",) + (("audio_out_ids", "label_audio_ids") if case == "text-only" else ())
    assert_equal_batches(ours, official(config)(copies(samples)), but=differing)
    assert len(ours) == len(samples)
    assert len(ours.audio_out_ids_start_group_loc) == len(ours.audio_out_ids_start)


def test_collating_twice_keeps_the_labels(config, tokenizer):
    """Upstream marks audio as untrained the second time it sees a sample: the audio loss is 0 from epoch two on."""
    samples = case_samples("single", tokenizer)
    theirs = official(config)
    assert (theirs(samples).label_audio_ids != -100).any()
    assert (theirs(samples).label_audio_ids == -100).all(), "upstream has changed: the copies may no longer be needed"
    samples = case_samples("single", tokenizer)
    ours = create_collator(config)
    assert_equal_batches(ours(samples), ours(samples))
    assert (ours(samples).label_audio_ids != -100).any()


@pytest.mark.parametrize("T", [1, 3, 9])
def test_a_clip_of_T_frames_has_T_plus_1_targets_per_codebook(T, config, tokenizer):
    batch = create_collator(config)([make_sample(tokenizer, ("user", "x"), ("assistant", T))])
    text, audio = batch.num_targets()
    assert audio.tolist() == [T + 1] * 8
    assert text == 3  # <|audio_out_bos|>, <|audio_eos|>, <|eot_id|>
    assert (batch.label_audio_ids == config.audio_stream_eos_id).sum(dim=1).tolist() == [1] * 8


def test_references_are_not_trained(config, tokenizer):
    turns = [("user", "ref"), ("assistant", 5), ("user", "new"), ("assistant", 7)]
    batch = create_collator(config)([make_sample(tokenizer, *turns, start_index=3)])
    text, audio = batch.num_targets()
    assert audio.tolist() == [8] * 8 and text == 3
    assert (batch.label_audio_ids[:, : 5 + 9] == -100).all()


# ---- what upstream cannot do


def test_clamped_index(config, tokenizer):
    """Three placeholders, two clips: upstream fails, we repeat the last clip, say so, and train nothing of the sample."""
    sample = make_sample(
        tokenizer, ("user", "a"), ("assistant", 4), ("user", "b"), ("assistant", 6), ("user", "c"), ("assistant", 2)
    )
    sample.audio_ids_concat, sample.audio_ids_start = sample.audio_ids_concat[:, :10], sample.audio_ids_start[:2]
    sample.source = "record 7"
    with pytest.raises(IndexError):
        official(config)(copies([sample]))
    sound = make_sample(tokenizer, ("user", "a"), ("assistant", 3))
    batch = create_collator(config, strict=False)([sample, sound])
    assert batch.clamped == ["record 7: 3 audio placeholders but 2 clip(s); it does not train"]
    last, clamped = batch.audio_out_ids[:, 4 + 9 :][:, :15], batch.audio_out_ids[:, 4 + 9 + 6 + 9 :][:, :15]
    assert torch.equal(last, clamped)
    alone = create_collator(config)([sound])
    assert all(torch.equal(a, b) for a, b in zip(batch.num_targets(), alone.num_targets())), "only the sound one trains"
    assert len(batch.packing.audio.rows) == len(alone.packing.audio.rows)
    with pytest.raises(CollateError, match=r"record 7: 3 audio placeholders but 2 clip"):
        create_collator(config)([sample])


def test_no_clip_to_clamp_to(config, tokenizer):
    """A frame of zeros stands in, so that nothing fails on a device."""
    sample = make_sample(tokenizer, ("user", "a"), ("assistant", 4))
    sample.audio_ids_concat, sample.audio_ids_start = None, None
    with pytest.raises(CollateError, match="0 clip"):
        create_collator(config)([sample])
    batch = create_collator(config, strict=False)([sample])
    assert batch.num_targets()[0] == 0 and batch.num_targets()[1].tolist() == [0] * 8 and batch.num_frames == 1
    assert torch.isfinite(make_model(config)(**batch.model_inputs()).audio_logits).all()


def test_frames_are_counted_with_and_without_the_delay_pattern(tokenizer):
    sample = make_sample(tokenizer, ("system", "voice ", 5), ("user", "a"), ("assistant", 4))
    for delay in (True, False):
        config = demo.tiny_config(tokenizer, use_delay_pattern=delay)
        assert create_collator(config)([sample]).num_frames == 9


@pytest.mark.parametrize("absent", [None, torch.zeros(0, dtype=torch.long)])
def test_samples_without_audio(absent, config, tokenizer):
    """Text alone, and input audio without output audio, with absent fields as None or empty."""
    text = make_sample(tokenizer, ("user", "hi"), ("assistant", "hello"))
    text.audio_ids_concat = text.audio_ids_start = text.audio_waveforms_concat = text.audio_waveforms_start = absent
    heard = make_sample(tokenizer, ("user", "what is this? ", 5), ("assistant", "a word"))
    model = make_model(config)
    for samples in ([text], [heard], [text, heard]):
        batch = create_collator(config)(samples)
        assert batch.num_targets()[1].tolist() == [0] * 8 and batch.num_targets()[0] > 0
        assert torch.isfinite(model(**batch.model_inputs()).logits).all()


def test_label_audio_of_its_own(config, tokenizer):
    """`audio_label_ids_concat` becomes the labels, delayed like the codes; samples without it keep theirs."""
    plain, other = case_samples("padded", tokenizer)
    other.audio_label_ids_concat = torch.randint(0, 64, other.audio_ids_concat.shape)
    batch = create_collator(config)([plain, other])
    unchanged = create_collator(config)([plain, dataclasses.replace(other, audio_label_ids_concat=None)])
    assert torch.equal(batch.audio_out_ids, unchanged.audio_out_ids)
    cut = int(batch.audio_out_ids_start[1])
    assert torch.equal(batch.label_audio_ids[:, :cut], unchanged.label_audio_ids[:, :cut])
    bare = create_collator(config)(
        [dataclasses.replace(other, audio_ids_concat=other.audio_label_ids_concat, audio_label_ids_concat=None)]
    )
    assert torch.equal(batch.label_audio_ids[:, cut:], bare.label_audio_ids)
    assert batch.has_label_overrides and not unchanged.has_label_overrides


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_codes_on_a_gpu(config, tokenizer):
    samples = case_samples("single", tokenizer)
    expected = create_collator(config)(samples)
    samples[0].audio_ids_concat = samples[0].audio_ids_concat.cuda()
    assert_equal_batches(create_collator(config)(samples), expected)
    assert expected.to("cuda", non_blocking=True).input_ids.is_cuda and expected.pin_memory().input_ids.is_pinned()


def test_batch_moves_as_a_whole(config, tokenizer):
    batch = create_collator(config)(case_samples("reference and target", tokenizer))
    moved = batch.to("meta", non_blocking=True)
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) >= 9 and all(t.is_meta for t in tensors)
    assert moved.sources == batch.sources and not batch.input_ids.is_meta
    assert len(moved) == 2


# ---- Whisper


def with_waveforms(sample, *seconds, rate=16000):
    rng = np.random.default_rng(0)
    waves = [torch.from_numpy(rng.standard_normal(int(s * rate)).astype(np.float32)) for s in seconds]
    starts = torch.tensor([0] + [len(w) for w in waves]).cumsum(0)[:-1]
    return dataclasses.replace(
        sample,
        audio_waveforms_concat=torch.cat(waves),
        audio_waveforms_start=starts,
        audio_sample_rate=torch.full((len(waves),), float(rate)),
    )


def official_whisper(config) -> HiggsAudioSampleCollator:
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    processor = WhisperProcessor.__new__(WhisperProcessor)  # only its feature extractor is used
    processor.feature_extractor = extractor
    collator = official(config)
    return HiggsAudioSampleCollator(
        **{
            k: v
            for k, v in vars(collator).items()
            if k not in ("whisper_processor", "encode_whisper_embed", "chunk_size_seconds", "chunk_size_samples")
        },
        whisper_processor=processor,
        encode_whisper_embed=True,
        chunk_size_seconds=1,
    )


def test_whisper_features_equal_the_official_ones(whisper_config, tokenizer):
    """Where upstream works: short input audio before any output audio."""
    sample = with_waveforms(make_sample(tokenizer, ("user", 5, "and", 4), ("assistant", 6)), 0.2, 0.9)
    ours = create_collator(whisper_config)([sample])
    assert_equal_batches(ours, official_whisper(whisper_config)(copies([sample])))
    assert ours.audio_features.shape == (2, 16, 100)


def test_output_audio_before_input_audio(whisper_config, tokenizer):
    sample = with_waveforms(make_sample(tokenizer, ("user", "speak"), ("assistant", 6), ("user", 5), ("assistant", 3)), 0.2)
    with pytest.raises((IndexError, ValueError)):
        official_whisper(whisper_config)(copies([sample]))
    batch = create_collator(whisper_config)([sample])
    alone = create_collator(whisper_config)([with_waveforms(make_sample(tokenizer, ("user", 5), ("assistant", 3)), 0.2)])
    assert torch.equal(batch.audio_features, alone.audio_features)
    assert torch.isfinite(make_model(whisper_config)(**batch.model_inputs()).audio_logits).all()


def test_long_input_audio_is_cut_into_chunks(whisper_config, tokenizer):
    """2.5 seconds in windows of one: three placeholders, three feature rows, every code in exactly one chunk."""
    sample = with_waveforms(make_sample(tokenizer, ("user", "hear ", 62), ("assistant", 6)), 2.5)
    batch = create_collator(whisper_config)([sample])
    assert (batch.input_ids == whisper_config.audio_in_token_idx).sum() == 3
    assert batch.audio_features.shape == (3, 16, 100)
    lengths = torch.diff(batch.audio_in_ids_start, append=torch.tensor([batch.audio_in_ids.shape[1]])) - 9
    assert lengths.tolist() == [25, 25, 12]
    back = []
    for start, T in zip(batch.audio_in_ids_start.tolist(), lengths.tolist()):
        back.append(torch.stack([batch.audio_in_ids[k, start + k + 1 : start + k + 1 + T] for k in range(8)]))
    assert torch.equal(torch.cat(back, dim=1), sample.audio_ids_concat[:, :62])
    assert batch.num_targets()[1].tolist() == [7] * 8
    assert torch.isfinite(make_model(whisper_config)(**batch.model_inputs()).audio_logits).all()


def test_a_batch_without_audio_still_has_features(whisper_config, tokenizer):
    batch = create_collator(whisper_config)(case_samples("text-only", tokenizer))
    assert batch.audio_features.shape == (0, 16, 100)
    model = make_model(whisper_config)
    assert torch.isfinite(model(**batch.model_inputs()).logits).all()


# ---- create_collator


def test_collator_follows_the_config(config, tokenizer):
    collator = create_collator(config)
    assert collator.use_delay_pattern and collator.return_audio_in_tokens and collator.audio_num_codebooks == 8
    assert collator.feature_extractor is None
    plain = create_collator(demo.tiny_config(tokenizer, use_delay_pattern=False, encode_audio_in_tokens=False))
    batch = plain(case_samples("reference and target", tokenizer))
    assert batch.audio_in_ids is None
    sample = case_samples("single", tokenizer)[0]
    codes = plain([sample]).audio_out_ids
    assert torch.equal(codes[:, 1:-1], sample.audio_ids_concat)
    assert torch.equal(build_delay_pattern_mask(codes[None], 64, 65)[0][0], collator([sample]).audio_out_ids)


def test_empty_and_mixed_batches_are_errors(config, tokenizer):
    with pytest.raises(CollateError, match="empty"):
        create_collator(config)([])
    one, two = case_samples("padded", tokenizer)
    with pytest.raises(CollateError, match="with and without labels"):
        create_collator(config)([one, dataclasses.replace(two, label_ids=None)])
