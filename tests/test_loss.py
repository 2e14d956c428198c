"""loss.py against plain loops, in both alignments, with everything missing that can be missing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import CASES, case_samples, flat, make_model, make_sample

import loss
from collate import create_collator
from common import AlignmentError, CopyCollapseError
from loss import IGNORE_INDEX, LabelSpec, LossSums, Objective, Scores, Tally, Targets, find_alignment


def forward(name_or_samples, config, tokenizer, model=None):
    samples = case_samples(name_or_samples, tokenizer) if isinstance(name_or_samples, str) else name_or_samples
    batch = create_collator(config)(samples)
    with torch.no_grad():
        return (model or make_model(config))(**batch.model_inputs()), batch


def slow_sums(output, batch, eos: int):
    """The definition, one position at a time."""
    B, S, _ = output.logits.shape
    K, N = batch.label_audio_ids.shape
    text, num_text, audio, num_audio, eos_sum = 0.0, 0, [0.0] * K, [0] * K, 0.0
    for b in range(B):
        for t in range(S - 1):
            target = int(output.expanded_labels[b, t + 1])
            if target != -100:
                text += -math.log(output.logits[b, t].double().softmax(-1)[target].item())
                num_text += 1
    for j in range(N - 1):
        for k in range(K):
            target = int(batch.label_audio_ids[k, j + 1])
            if target != -100:
                nats = -math.log(output.audio_logits[j, k].double().softmax(-1)[target].item())
                audio[k] += nats
                num_audio[k] += 1
                eos_sum += nats if target == eos else 0.0
    return text, num_text, audio, num_audio, eos_sum


@pytest.mark.parametrize("case", CASES)
def test_sums_equal_the_slow_reference(case, config, tokenizer):
    """float32 against float64 loops: measured relative difference at most 2.1e-7."""
    output, batch = forward(case, config, tokenizer)
    labels = LabelSpec.of(config)
    sums = loss.dense_sums(output, batch, labels)
    text, num_text, audio, num_audio, eos = slow_sums(output, batch, labels.stream_eos)
    assert sums.text.nats.item() == pytest.approx(text, rel=1e-5)
    assert sums.audio.nats.tolist() == pytest.approx(audio, rel=1e-5) if audio else sums.audio.nats.sum() == 0
    assert sums.eos.nats.item() == pytest.approx(eos, rel=1e-5)
    assert (sums.text.targets, sums.audio.targets.tolist()[: len(num_audio)]) == (num_text, num_audio)
    counted = sums.text.targets[0].long(), sums.audio.targets.long()
    assert all(torch.equal(a, b) for a, b in zip(batch.num_targets(), counted))


def sums_by_hand(text: float, num_text: float, audio: list[float], num_audio: list[float]) -> LossSums:
    def tally(nats, targets) -> Tally:
        return Tally(torch.tensor(nats), torch.tensor(targets), torch.zeros(len(nats) if isinstance(nats, list) else ()))

    zero = torch.zeros(())
    return LossSums(tally([text], [num_text]), tally(audio, num_audio), *[tally(0.0, 0.0)] * 3, zero, zero)


def counts_of(sums: LossSums) -> tuple[torch.Tensor, torch.Tensor]:
    return sums.text.targets[0], sums.audio.targets


def test_the_objective_by_hand():
    sums = sums_by_hand(6.0, 3.0, [4.0, 9.0], [2.0, 3.0])
    assert Objective()(sums, *counts_of(sums)) == pytest.approx(6 / 3 + (4 / 2 + 9 / 3) / 2)
    weighted = Objective(0.5, 2.0, (1.0, 3.0))(sums, *counts_of(sums))
    assert weighted == pytest.approx(0.5 * 2 + 2 * (0.5 * 2 + 1.5 * 3) / 2)


def test_micro_batches_share_one_denominator(config, tokenizer):
    """Parts scored with the global counts add up to the whole."""
    model = make_model(config)
    labels = LabelSpec.of(config)
    samples = [s for case in CASES for s in case_samples(case, tokenizer)]

    def sums_of(part):
        output, batch = forward(part, config, tokenizer, model)
        return loss.dense_sums(output, batch, labels)

    whole, parts = sums_of(samples), [sums_of(samples[:1]), sums_of(samples[1:4]), sums_of(samples[4:])]
    objective, counts = Objective(), counts_of(whole)
    assert sum(objective(p, *counts) for p in parts).item() == pytest.approx(objective(whole, *counts).item(), rel=1e-6)
    torch.testing.assert_close(flat(parts[0] + parts[1] + parts[2]), flat(whole), rtol=1e-5, atol=1e-4)


def test_the_mean_of_means_is_something_else():
    """3 targets at 2 nats and 1 at 1 nat: 7 / 4 nats per target, not (2 + 1) / 2."""
    parts = [sums_by_hand(text, count, [0.0], [0.0]) for text, count in ((6.0, 3.0), (1.0, 1.0))]
    counts = counts_of(parts[0] + parts[1])
    assert sum(Objective()(p, *counts) for p in parts) == 7 / 4
    assert sum(Objective()(p, *counts_of(p)) for p in parts) / 2 == 1.5


def targets(labels: torch.Tensor, inputs: torch.Tensor | None = None) -> Targets:
    inputs = torch.zeros_like(labels) if inputs is None else inputs
    return Targets(torch.arange(len(labels)), labels, inputs)


def scores(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    return loss.score_logits(logits, labels, torch.zeros_like(labels))


def test_right_guesses_by_hand():
    """Text: 2 of 3 right. Audio: codebook 0 right at 1 of 2, codebook 1 at its only target, an end of stream (5)."""
    text, audio = torch.zeros(4, 1, 7), torch.zeros(3, 2, 6)
    for position, token in enumerate((3, 4, 5, 6)):
        text[position, 0, token] = 1.0
    for row, codes in enumerate(((1, 2), (3, 5), (4, 4))):
        audio[row, 0, codes[0]] = audio[row, 1, codes[1]] = 1.0
    labels = torch.tensor([[3], [-100], [5], [1]]), torch.tensor([[1, -100], [2, 5], [-100, -100]])
    streams = [(targets(label), scores(logits, label)) for logits, label in zip((text, audio), labels)]
    sums = LossSums.of(*streams[0], *streams[1], stream_eos=5)
    assert (sums.text.correct, sums.audio.correct.tolist(), sums.eos.correct) == (2, [1, 1], 1)
    values = loss.Objective().metrics(sums)
    assert values["text_accuracy"] == pytest.approx(2 / 3) and values["audio_accuracy"] == pytest.approx(2 / 3)
    assert values["codebook_accuracies"] == [0.5, 1.0] and values["eos_accuracy"] == 1.0


@pytest.mark.parametrize("masked", ["text", "audio", "both"])
def test_nothing_to_predict_gives_exactly_zero(masked, config, tokenizer):
    batch = create_collator(config)(case_samples("padded", tokenizer))
    if masked != "audio":
        batch.label_ids.fill_(-100)
    if masked != "text":
        batch.label_audio_ids.fill_(-100)
    model = make_model(config)
    sums = loss.dense_sums(model(**batch.model_inputs()), batch, LabelSpec.of(config))
    value = Objective()(sums, *[n.float() for n in batch.num_targets()])
    value.backward()
    assert torch.isfinite(value) and (value == 0) == (masked == "both")
    head = model.audio_decoder_proj
    assert (head.text_lm_head.weight.grad.abs().max() == 0) == (masked != "audio")
    assert (head.audio_lm_head.weight.grad.abs().max() == 0) == (masked != "text")


# ---- alignment


def test_no_prediction_sees_its_target(config, tokenizer):
    """Changing the codes from column j on leaves every logit that is scored against a column before or at j unchanged."""
    sample = make_sample(tokenizer, ("user", "abc"), ("assistant", 12))
    model = make_model(config)
    output, batch = forward([sample], config, tokenizer, model)
    for j in (1, 5, 15):
        changed = dataclasses.replace(batch, audio_out_ids=batch.audio_out_ids.clone())
        changed.audio_out_ids[:, j:] = (changed.audio_out_ids[:, j:] + 1) % 64
        with torch.no_grad():
            logits = model(**changed.model_inputs()).audio_logits
        assert torch.equal(logits[:j], output.audio_logits[:j]), "a logit saw the column it is scored against"
        assert not torch.equal(logits[j:], output.audio_logits[j:])


def test_expanded_labels_are_rebuilt_when_the_model_returns_none(config, tokenizer):
    """The error of trainers that cut one side ("255 vs 256"): logits have more positions than unexpanded labels."""
    for case in CASES:
        output, batch = forward(case, config, tokenizer)
        labels = LabelSpec.of(config)
        expected = loss.text_labels(output, batch, labels)
        assert torch.equal(expected, output.expanded_labels)
        output.expanded_labels = None
        assert torch.equal(loss.text_labels(output, batch, labels), expected)


def test_labels_are_never_cut_to_fit(config, tokenizer):
    output, batch = forward("padded", config, tokenizer)
    B, S, _ = output.logits.shape
    assert batch.label_ids.shape[1] < S
    output.expanded_labels = output.expanded_labels[:, :-1]
    with pytest.raises(ValueError, match=rf"\({B}, {S - 1}\) positions, logits \({B}, {S}\)"):
        loss.dense_sums(output, batch, LabelSpec.of(config))


def test_alignment_of_the_official_labels_is_shift(config, tokenizer):
    output, batch = forward("multi-segment", config, tokenizer)
    assert find_alignment(output.expanded_labels, output.expanded_input_ids, "text") == "shift"
    assert find_alignment(batch.label_audio_ids, batch.audio_out_ids, "audio") == "shift"


def test_labels_shifted_beforehand_give_the_same_loss(config, tokenizer):
    output, batch = forward("multi-segment", config, tokenizer)
    labels = LabelSpec.of(config)
    expected = loss.dense_sums(output, batch, labels)
    output.expanded_labels = torch.nn.functional.pad(output.expanded_labels[:, 1:], (0, 1), value=-100)
    batch.label_audio_ids = torch.nn.functional.pad(batch.label_audio_ids[:, 1:], (0, 1), value=-100)
    text = find_alignment(output.expanded_labels, output.expanded_input_ids, "text")
    audio = find_alignment(batch.label_audio_ids, batch.audio_out_ids, "audio")
    assert (text, audio) == ("aligned", "aligned")
    sums = loss.dense_sums(output, batch, dataclasses.replace(labels, text=text, audio=audio))
    assert torch.equal(flat(sums), flat(expected))


def test_unrelated_labels_are_an_error():
    inputs = torch.tensor([[5, 6, 7, 8, 9]])
    with pytest.raises(AlignmentError, match="row 0 position 2: label 9, input 7, next input 8"):
        find_alignment(torch.tensor([[-100, -100, 9, 8, 7]]), inputs, "text")
    assert find_alignment(torch.full((1, 5), -100), inputs, "text") is None


# ---- copy-collapse guard


def predictions(predict_input: bool, positions: int = 50) -> tuple[torch.Tensor, Targets]:
    """Logits of a model that is sure of its input, or of its target."""
    torch.manual_seed(0)
    K, C = 8, 66
    stream = torch.randint(0, 64, (positions + 1, K))
    inputs, labels = stream[:-1], stream[1:]
    logits = 20.0 * torch.nn.functional.one_hot(inputs if predict_input else labels, C).float()
    return logits, targets(labels, inputs)


@torch.no_grad()
def copy_share(logits: torch.Tensor, audio: Targets) -> float:
    text = targets(torch.zeros((0, 1), dtype=torch.long))
    text_scores = loss.score_logits(torch.zeros(0, 1, 9), text.labels, text.inputs)
    audio_scores = loss.score_logits(logits, audio.labels, audio.inputs)
    return LossSums.of(text, text_scores, audio, audio_scores, stream_eos=65).copy_share()


def test_guard_tells_copying_from_predicting():
    assert copy_share(*predictions(predict_input=False)) == 0
    with pytest.raises(CopyCollapseError, match="unshifted labels"):
        copy_share(*predictions(predict_input=True))
    assert copy_share(*predictions(predict_input=True, positions=3)) == 1.0, "too few positions to judge"


def test_guard_lets_slow_codes_repeat():
    """Codes that hold for seven frames: a calibrated model says "the same again" at every position, and is not stopped."""
    logits, audio = predictions(predict_input=True)
    stay = 0.85
    assert copy_share(torch.log(torch.where(logits > 0, stay, (1 - stay) / 65)), audio) == 0


def test_targets_without_labels_are_not_copies():
    """IGNORE_INDEX differs from every input, but nothing is predicted there."""
    logits, audio = predictions(predict_input=True)
    assert copy_share(logits, audio._replace(labels=torch.full_like(audio.labels, IGNORE_INDEX))) == 0
