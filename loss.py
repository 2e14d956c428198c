"""The dual loss: text and per-codebook audio, as float32 sums and counts; optionally voice consistency.

    L = w_text * S_text / N_text + w_audio * mean_k(c_k * S_k / N_k) + w_cons * S_voice / N_voice

S are sums of cross-entropy in nats. N are counts of targets over all micro-batches of the optimizer step and all
ranks, known before the first backward pass. Averaging per-micro-batch means over-weights targets in micro-batches
that have few.

Upstream labels are input-aligned: `expanded_labels[b, t]` is the token fed at t, `label_audio_ids[k, j]` the code
fed at frame j. So the prediction at position t is scored against the label at t + 1. Scored against the label at t
the loss falls as well, but the model only learns to copy its input and generates silence. `find_alignment` and
`copy_share` detect both cases.

The voice term (`consistency_tally`) is InfoNCE: the mean hidden state of a speaker's trained audio should be closer to
the mean over that speaker's reference than to other speakers' references in the same micro-batch of all ranks. It is the
one term that depends on how a step is divided: accumulation over more micro-batches leaves fewer candidates.

Legend: B batch, S positions after expansion, K codebooks, N audio positions in the batch, V text vocabulary, C audio
vocabulary (codebook size plus two stream ids), n scored positions, D width, P pairs of a reference and trained audio.

    python loss.py      # shows the three alignments on a toy example
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import AlignmentError, CopyCollapseError

IGNORE_INDEX = -100

CONFIDENT_COPY = 0.9  # probability of the input token from which a prediction counts as a copy
MAX_COPY_SHARE = 0.5  # a sound model stays near 0, a collapsed one is near 1
MIN_COPY_POSITIONS = 32  # fewer positions than this say nothing

VOICE_TEMPERATURE = 0.1  # cosines of mean hidden states lie close together

# Where the label of the token predicted at position t is: at t + 1 ("shift", upstream's labels) or at t ("aligned",
# labels that were shifted beforehand).
Alignment = Literal["shift", "aligned"]


@dataclass(frozen=True)
class LabelSpec:
    """How labels are read: the ids that tell audio from text, and each stream's alignment."""

    audio_in_token: int
    audio_out_token: int
    stream_eos: int
    text: Alignment = "shift"
    audio: Alignment = "shift"

    @classmethod
    def of(cls, config) -> LabelSpec:
        """From a `HiggsAudioConfig`, with upstream's alignment."""
        return cls(config.audio_in_token_idx, config.audio_out_token_idx, config.audio_stream_eos_id)

    @property
    def is_upstream(self) -> bool:
        return self.text == self.audio == "shift"

    def is_text(self, ids: Tensor) -> Tensor:
        return (ids != self.audio_in_token) & (ids != self.audio_out_token)


# ---------------------------------------------------------------------------------------------------------------------
# Scores: predictions against their labels


class Targets(NamedTuple):
    """What one head predicts. K is 1 for text.

    rows   [n] int64, positions whose hidden states predict
    labels [n, K] int64, IGNORE_INDEX where nothing is trained
    inputs [n, K] int64, what is fed at the position
    near   [n, K] bool, codes of frames around a change of speaker; None where no sample tells of one
    """

    rows: Tensor
    labels: Tensor
    inputs: Tensor
    near: Tensor | None = None


class Scores(NamedTuple):
    """Predictions against labels, [n, K] each; 0 and False where nothing is trained."""

    nats: Tensor  # float32, part of the graph
    is_correct: Tensor  # bool, the label is the likeliest prediction
    is_copy: Tensor  # bool, the input, which is not the label, is predicted with confidence; evaluation only


def score_logits(logits: Tensor, labels: Tensor, inputs: Tensor) -> Scores:
    """logits: [n, K, C] of any float dtype; labels, inputs: [n, K]"""
    n, K, C = logits.shape
    flat, shape = logits.float().reshape(n * K, C), (n, K)
    nats = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    is_correct = flat.detach().argmax(1).view(shape) == labels
    is_copy = torch.zeros_like(is_correct)
    if not torch.is_grad_enabled():
        chosen = flat.gather(1, inputs.reshape(n * K, 1)).squeeze(1)
        is_sure = (chosen - flat.logsumexp(1)).exp().view(shape) > CONFIDENT_COPY
        is_copy = is_sure & _is_changed(labels, inputs)
    return Scores(nats.view(shape), is_correct, is_copy)


def _is_changed(labels: Tensor, inputs: Tensor) -> Tensor:
    """Where copying the input would be wrong."""
    return (labels != IGNORE_INDEX) & (labels != inputs)


def max_logits(device: torch.device) -> int:
    """How many may be alive at once: 128 MiB in float32, 512 MiB on a GPU, to which small products are no work."""
    return 2**27 if device.type == "cuda" else 2**25


def score_head(hidden: Tensor, head: nn.Module, targets: Targets) -> Scores:
    """hidden: [n, D]. At most `max_logits` logits exist at once; several pieces are recomputed in the backward pass."""
    run: Callable = functools.partial(_score_piece, head)
    size = max(1, max_logits(hidden.device) // head.out_features)
    if len(hidden) <= size:
        return run(hidden, targets.labels, targets.inputs)
    if torch.is_grad_enabled():
        run = functools.partial(checkpoint, run, use_reentrant=False)
    pieces = zip(*(tensor.split(size) for tensor in (hidden, targets.labels, targets.inputs)))
    return Scores(*map(torch.cat, zip(*(run(*piece) for piece in pieces))))


def _score_piece(head: nn.Module, hidden: Tensor, labels: Tensor, inputs: Tensor) -> Scores:
    return score_logits(head(hidden).unflatten(1, (labels.shape[1], -1)), labels, inputs)


def dense_targets(output, batch, spec: LabelSpec) -> tuple[Targets, Targets]:
    """Text and audio targets of upstream's dense output; text rows count the positions of the flattened [B, S].

    raises: ValueError if labels and logits do not cover the same positions
    """
    labels, inputs = text_labels(output, batch, spec), output.expanded_input_ids
    if spec.text == "shift":  # the last position predicts nothing
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    rows = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    text = Targets(rows, labels.flatten()[rows, None], inputs.flatten()[rows, None])
    labels, inputs = batch.label_audio_ids.T, batch.audio_out_ids.T  # [N, K]
    near = None if batch.near_changes is None else batch.near_changes.T
    if labels.shape != (covered := output.audio_logits.shape[:2]):
        raise ValueError(f"audio labels cover {tuple(labels.shape)} positions, logits {tuple(covered)}")
    if spec.audio == "shift":  # a clip's first label is IGNORE_INDEX, so no clip predicts the next one's
        labels = F.pad(labels[1:], (0, 0, 0, 1), value=IGNORE_INDEX) if len(labels) else labels
        near = None if near is None else F.pad(near[1:], (0, 0, 0, 1))
    return text, Targets(torch.arange(len(labels), device=labels.device), labels, inputs, near)


def text_labels(output, batch, spec: LabelSpec) -> Tensor:
    """The labels of `output.logits`, position by position, not yet shifted: [B, S] int64.

    Without `output.expanded_labels` they are rebuilt from the batch's labels. Nothing is ever cut to fit.
    """
    labels = output.expanded_labels
    if labels is None:
        expanded, mask = output.expanded_input_ids, output.attention_mask.bool()
        labels = torch.full_like(expanded, IGNORE_INDEX)
        is_token = batch.attention_mask.bool() & spec.is_text(batch.input_ids)
        labels[mask & spec.is_text(expanded)] = batch.label_ids[is_token]
    if labels.shape != output.logits.shape[:2]:
        raise ValueError(f"labels cover {tuple(labels.shape)} positions, logits {tuple(output.logits.shape[:2])}")
    return labels


def dense_sums(output, batch, spec: LabelSpec) -> LossSums:
    """The sums of upstream's dense output."""
    text, audio = dense_targets(output, batch, spec)
    text_scores = score_logits(output.logits.flatten(0, 1)[text.rows][:, None], text.labels, text.inputs)
    audio_scores = score_logits(output.audio_logits, audio.labels, audio.inputs)
    return LossSums.of(text, text_scores, audio, audio_scores, spec.stream_eos)


# ---------------------------------------------------------------------------------------------------------------------
# Sums


class Summable:
    """A dataclass of tensors, numbers and further Summables, treated field by field."""

    def __add__(self, other):
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def map(self, function: Callable[[Any], Any]):
        """`function` of every tensor and number, in the order of the fields."""
        values = (getattr(self, f.name) for f in fields(self))
        return type(self)(*(v.map(function) if isinstance(v, Summable) else function(v) for v in values))

    def detach(self):
        return self.map(lambda value: value.detach() if isinstance(value, Tensor) else value)


@dataclass
class Tally(Summable):
    """Sums over some targets: cross-entropy in nats, their number, and how many were predicted correctly."""

    nats: Tensor
    targets: Tensor
    correct: Tensor

    @classmethod
    def of(cls, scores: Scores, is_target: Tensor) -> Tally:
        """Per codebook: [K] each. is_target: [n, K] bool"""
        return cls(scores.nats.sum(0), is_target.sum(0).float(), scores.is_correct.sum(0).float())

    @classmethod
    def among(cls, scores: Scores, chosen: Tensor) -> Tally:
        """Over the targets `chosen` [n, K] bool, without gradient: [] each."""
        nats, correct = scores.nats.detach() * chosen, scores.is_correct & chosen
        return cls(nats.sum(), chosen.sum().float(), correct.sum().float())


def _ratio(total: Tensor, count: Tensor) -> float | None:
    """None where there is nothing to divide by."""
    return (total / count).item() if count > 0 else None


@dataclass
class LossSums(Summable):
    """What the loss and its metrics are computed from; add micro-batches with `+`.

    `Objective.metrics` reports NAME_loss and NAME_accuracy of every Tally here.
    """

    text: Tally  # [1]
    audio: Tally  # [K]
    eos: Tally  # [] end-of-stream targets, which are among audio's
    speaker_change: Tally  # [] audio targets around a change of speaker
    consistency: Tally  # [] pairs of voices
    changed: Tensor  # [] targets that differ from the input at the predicting position
    copied: Tensor  # [] those of them at which the input is predicted; evaluation only

    @classmethod
    def of(cls, text: Targets, text_scores: Scores, audio: Targets, audio_scores: Scores, stream_eos: int) -> LossSums:
        zero = text_scores.nats.new_zeros(())
        is_target = audio.labels != IGNORE_INDEX
        near = torch.zeros_like(is_target) if audio.near is None else audio.near & is_target
        return cls(
            text=Tally.of(text_scores, text.labels != IGNORE_INDEX),
            audio=Tally.of(audio_scores, is_target),
            eos=Tally.among(audio_scores, audio.labels == stream_eos),
            speaker_change=Tally.among(audio_scores, near),
            consistency=Tally(zero, zero, zero),
            changed=(_is_changed(*text[1:3]).sum() + _is_changed(*audio[1:3]).sum()).float(),
            copied=(text_scores.is_copy.sum() + audio_scores.is_copy.sum()).float(),
        )

    def copy_share(self) -> float:
        """The share of changed targets at which the input is predicted, from global sums.

        Slowly changing codes make a sound model repeat itself too, but not with confidence where the next code differs.

        raises: CopyCollapseError if it is too high
        """
        changed, copied = self.changed.item(), self.copied.item()
        share = copied / max(1.0, changed)
        if changed >= MIN_COPY_POSITIONS and share > MAX_COPY_SHARE:
            problem = f"at {share:.0%} of {changed:.0f} supervised positions the model predicts the token it was just fed"
            raise CopyCollapseError(
                f"{problem} instead of the next one. These weights were trained on unshifted labels; their loss looks low and "
                "they generate silence. Start again from the published checkpoint."
            )
        return share


@dataclass(frozen=True)
class Objective:
    """The scalar that trains: the weights of the formula at the top of this file."""

    text_weight: float = 1.0
    audio_weight: float = 1.0
    codebook_weights: tuple[float, ...] | None = None  # one per codebook, normalised here to mean 1; None: equal
    consistency_weight: float = 0.0

    def __call__(self, sums: LossSums, num_text: Tensor, num_audio: Tensor, num_voices: float = 0.0) -> Tensor:
        """The loss, or of a part of the batch that part's share; a component without targets contributes exactly 0.

        num_text: []; num_audio: [K]; num_voices: the global counts of targets
        """
        weights = torch.ones_like(sums.audio.nats)
        if self.codebook_weights is not None:
            weights = torch.tensor(self.codebook_weights, dtype=weights.dtype).to(weights.device, non_blocking=True)
        weights = weights / weights.mean()
        text = sums.text.nats[0] / num_text.clamp(min=1)
        audio = (weights * sums.audio.nats / num_audio.clamp(min=1)).mean()
        value = self.text_weight * text + self.audio_weight * audio
        if not self.consistency_weight:
            return value
        return value + self.consistency_weight * sums.consistency.nats / max(1.0, num_voices)

    def metrics(self, sums: LossSums) -> dict:
        """Losses in nats per target and accuracies, from global sums; None where nothing was supervised."""
        audio = sums.audio
        losses = [_ratio(nats, count) for nats, count in zip(audio.nats, audio.targets)]
        supervised = [value for value in losses if value is not None]
        tallies = {f.name: tally for f in fields(sums) if isinstance(tally := getattr(sums, f.name), Tally)}
        del tallies["audio"]
        if not self.consistency_weight:
            del tallies["consistency"]
        values = {f"{name}_loss": _ratio(tally.nats, tally.targets) for name, tally in tallies.items()}
        values |= {f"{name}_accuracy": _ratio(tally.correct, tally.targets) for name, tally in tallies.items()}
        always = {name: values[name] or 0.0 for name in ("text_loss", "consistency_loss") if name in values}
        return values | always | {
            "loss": self(sums, sums.text.targets[0], audio.targets, sums.consistency.targets.item()).item(),
            "audio_loss": sum(supervised) / len(supervised) if supervised else 0.0,
            "codebook_losses": losses,
            "audio_accuracy": _ratio(audio.correct.sum(), audio.targets.sum()),
            "codebook_accuracies": [_ratio(right, count) for right, count in zip(audio.correct, audio.targets)],
            "text_targets": int(sums.text.targets.item()),
            "audio_targets": int(audio.targets.sum().item()),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Voice consistency


def pool_voices(rows: Callable[[Tensor], Tensor], voices) -> tuple[Tensor, Tensor]:
    """Mean hidden states, float32, of each pair: its trained audio [P, D] and its reference [P, D] without gradient.

    rows: normalised hidden states [n, D] of n positions; voices: a `collate.Voices`
    """
    with torch.no_grad():
        reference = _means(rows(voices.reference).float(), voices.reference_lengths)
    return _means(rows(voices.trained).float(), voices.trained_lengths), reference


def _means(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean of each piece of states [sum(lengths), D]; piece by piece, as index_add is not deterministic on a GPU."""
    means = [piece.mean(0) for piece in states.split(lengths)] if lengths else []
    return torch.stack(means) if means else states[:0]


def num_comparable(speakers: Sequence[str]) -> int:
    """How many of these pairs count: all of them, or none where there are fewer than two speakers."""
    return len(speakers) if len(set(speakers)) > 1 else 0


def consistency_tally(trained: Tensor, reference: Tensor, speakers: Sequence[str], first: int = 0) -> Tally:
    """InfoNCE over cosines. References of the same speaker are not compared with each other.

    trained:   [P, D], of this rank's pairs
    reference: [R, D], of all ranks' pairs; `first` is the index of this rank's first one
    speakers:  of all R pairs
    returns:   exactly 0 with fewer than two speakers
    """
    if len(trained) == 0 or not num_comparable(speakers):
        zero = reference.new_zeros(())
        return Tally(zero, zero, zero)
    names = {name: number for number, name in enumerate(speakers)}
    numbers = torch.tensor([names[name] for name in speakers]).to(reference.device, non_blocking=True)
    own = torch.arange(first, first + len(trained), device=reference.device)
    is_other = numbers[own, None] != numbers
    is_candidate = is_other.index_put((own - first, own), is_other.new_ones(()))
    cosines = F.normalize(trained, dim=1) @ F.normalize(reference, dim=1).T
    logits = (cosines / VOICE_TEMPERATURE).masked_fill(~is_candidate, -torch.inf)
    nats = F.cross_entropy(logits, own, reduction="sum")
    return Tally(nats, nats.new_full((), len(trained)), (logits.detach().argmax(1) == own).sum().float())


# ---------------------------------------------------------------------------------------------------------------------
# Alignment


def find_alignment(labels: Tensor, inputs: Tensor, what: str) -> Alignment | None:
    """Where the labels are relative to the inputs they were made from.

    labels, inputs: [rows, positions]
    returns: None if nothing is supervised
    raises:  AlignmentError, showing the first positions that fit neither alignment
    """
    supervised = labels != IGNORE_INDEX
    if not supervised.any():
        return None
    if (labels == inputs)[supervised].all():
        return "shift"
    successors = F.pad(inputs[:, 1:], (0, 1), value=IGNORE_INDEX)
    if (labels == successors)[supervised].all():
        return "aligned"
    wrong = (supervised & (labels != inputs)).nonzero()[:5].tolist()
    found = ((r, p, labels[r, p], inputs[r, p], successors[r, p]) for r, p in wrong)
    shown = "; ".join("row {} position {}: label {}, input {}, next input {}".format(*values) for values in found)
    raise AlignmentError(f"{what} labels are neither the inputs nor the inputs one position later: {shown}")


def main() -> None:
    inputs = torch.tensor([[5, 6, 7, 8, 9]])
    cases = {
        "upstream labels": torch.tensor([[-100, -100, 7, 8, 9]]),
        "labels shifted beforehand": torch.tensor([[-100, 7, 8, 9, -100]]),
        "labels of another text": torch.tensor([[-100, -100, 9, 8, 7]]),
    }
    for name, labels in cases.items():
        try:
            found = find_alignment(labels, inputs, "text")
        except AlignmentError as error:
            found = f"AlignmentError: {error}"
        print(f"{name:26} {labels.tolist()[0]} on {inputs.tolist()[0]}: {found}")


if __name__ == "__main__":
    main()
