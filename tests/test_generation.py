"""What is trained is what the official generate() says: the proof that the labels, the shift and the masks are right."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from conftest import make_model, make_sample

import loss
import model_patch
from collate import create_collator
from common import CopyCollapseError
from distributed import setup_distributed
from generate.files import read_results
from generate.official import Sampling, as_prompt, generate_one
from generate.samples import Prompt, Sampler

TURNS = [[("user", "first"), ("assistant", 11)], [("user", "second one"), ("assistant", 7)]]


def clips(tokenizer):
    samples = [make_sample(tokenizer, *turns, seed=i) for i, turns in enumerate(TURNS)]
    prompts = [as_prompt(make_sample(tokenizer, turns[0]), tokenizer) for turns in TURNS]
    return samples, prompts


class Evaluated(NamedTuple):
    sums: loss.LossSums
    audio: loss.Targets
    audio_logits: torch.Tensor


def overfit(config, samples, unshifted: bool, steps: int = 250):
    """Train on the samples until the loss is near zero; returns the model, its last loss and what was scored."""
    model = model_patch.patch_for_training(make_model(config)).train()
    batch = create_collator(config)(samples)
    alignment = "aligned" if unshifted else "shift"
    labels = dataclasses.replace(loss.LabelSpec.of(config), text=alignment, audio=alignment)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        sums = loss.dense_sums(model(**batch.model_inputs()), batch, labels)
        value = loss.Objective()(sums, sums.text.targets[0], sums.audio.targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        output = model(**batch.model_inputs())
        labels = loss.LabelSpec.of(config)
        sums = loss.dense_sums(output, batch, labels)
    return model, value.item(), Evaluated(sums, loss.dense_targets(output, batch, labels)[1], output.audio_logits)


@pytest.fixture(scope="module")
def trained(tokenizer):
    from tools import toys as demo

    samples, prompts = clips(tokenizer)
    return overfit(demo.tiny_config(tokenizer), samples, unshifted=False), samples, prompts


def test_our_loss_regenerates_the_clips(trained, tokenizer):
    (model, value, scored), samples, prompts = trained
    assert value < 0.05
    for sample, prompt in zip(samples, prompts):
        said = generate_one(model, tokenizer, prompt, max_new_tokens=60)
        assert said.stopped and len(said.codes) == 1
        assert torch.equal(said.codes[0], sample.audio_ids_concat)
    assert scored.sums.copy_share() < 0.1


def test_unshifted_loss_falls_as_well_but_the_clips_are_lost(config, tokenizer, tmp_path):
    samples, _ = clips(tokenizer)
    model, value, scored = overfit(config, samples, unshifted=True)
    assert value < 0.05, "the wrong loss falls just as far"
    matching = compared = 0
    for sample, turns in zip(samples, TURNS):
        # Such a model does not even begin to speak; give it the first token, as the serve engine can.
        prompt = as_prompt(make_sample(tokenizer, turns[0]), tokenizer, force_audio=True)
        said = generate_one(model, tokenizer, prompt, max_new_tokens=60)
        T = min(said.codes[0].shape[1], sample.audio_ids_concat.shape[1]) if said.codes else 0
        matching += (said.codes[0][:, :T] == sample.audio_ids_concat[:, :T]).sum().item() if T else 0
        compared += sample.audio_ids_concat.numel()
    assert matching / compared < 0.2
    # Sampling while training reports that they got stuck.
    target = torch.zeros((8, 40), dtype=torch.long)
    request = Prompt("0", "", "", prompt, target, target[:, :0])
    sampler = Sampler([request], tokenizer, Sampling(temperature=0, ras_win_len=0), tmp_path)
    assert sampler.sample(model, 1, setup_distributed("cpu"))["runaway_rate"] == 1
    assert read_results(tmp_path / "step_1")[0]["runaway"] in ("loop", "silence")
    with pytest.raises(CopyCollapseError):
        scored.sums.copy_share()


def test_teacher_forced_argmax_is_what_generate_says(trained, config, tokenizer):
    """At every supervised (codebook, column) the argmax under teacher forcing equals the greedily generated id."""
    (model, _, scored), _, prompts = trained
    supervised = scored.audio.labels[:-1].T != loss.IGNORE_INDEX  # [K, N - 1]
    argmax = scored.audio_logits[:-1].argmax(-1).T
    generated = torch.cat([generate_one(model, tokenizer, prompt, max_new_tokens=60).delayed[0] for prompt in prompts], dim=1)
    assert generated.shape[1] == supervised.shape[1] + 1
    assert torch.equal(generated[:, 1:][supervised], argmax[supervised])


def test_supervised_pairs_are_the_sampled_ones(trained, tokenizer, monkeypatch):
    """`_sample_audio_tokens` overwrites delayed codebooks with stream ids; what it leaves to the model is what we train."""
    (model, *_), samples, prompts = trained
    kept: list[torch.Tensor] = []
    original = HiggsAudioModel._sample_audio_tokens

    def spy(self, *args, audio_logits, num_delay, num_remaining_delays, **kwargs):
        """Call it with each of two argmaxes; ids that differ were left to the model."""
        first, second = torch.full_like(audio_logits, -1e9), torch.full_like(audio_logits, -1e9)
        first[..., 3], second[..., 4] = 0.0, 0.0

        def call(logits):  # upstream counts the remaining delays down in place
            state = {"num_delay": num_delay, "num_remaining_delays": copy.deepcopy(num_remaining_delays)}
            return original(self, *args, audio_logits=logits, **state, **kwargs)

        kept.append(call(first)[1] != call(second)[1])
        return call(audio_logits)

    monkeypatch.setattr(HiggsAudioModel, "_sample_audio_tokens", spy)
    for sample, prompt in zip(samples, prompts):
        kept.clear()
        generate_one(model, tokenizer, prompt, max_new_tokens=60)
        sampled = torch.stack(kept, dim=1)  # [K, columns 1 to the last]
        supervised = create_collator(model.config)([sample]).label_audio_ids[:, 1:] != loss.IGNORE_INDEX
        assert torch.equal(sampled, supervised)
