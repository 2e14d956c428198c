"""The dual loss: text and per-codebook audio, as float32 sums and counts; and, where asked for, voice consistency.

    L = w_text * S_text / N_text + w_audio * mean_k(c_k * S_k / N_k) + w_cons * S_voices / N_voices

S are sums of cross-entropy in nats, N counts of targets over *all* micro-batches of the optimizer step and all ranks,
known before the first backward. Averaging the means of micro-batches instead weighs targets by the company they keep.

Upstream labels are input-aligned: `expanded_labels[b, t]` is the token fed at t, and `label_audio_ids[k, j]` the code fed
at frame j. Position t therefore has to be scored against the label at t + 1. Scored in place the loss falls as well, to a
model that copies its input and speaks silence; `find_alignment` and `copy_counts` exist so that this cannot happen unseen.

The voice term (`consistency_sums`) asks of the audio that a sample is trained to speak to be nearer, in the model's last hidden
states, to the same speaker's reference in that sample than to the references of other speakers. Those others are the ones
in the same micro-batch of all ranks, whose references are known at that moment: so many ranks with one micro-batch each give
what one rank gives with all of their samples, whereas accumulating gradients over more micro-batches means fewer rivals for
each voice. It is the one term that depends on how a step's samples are divided.

Legend: B batch, S positions after expansion, K codebooks, N audio positions in the batch, V text vocabulary, C audio
vocabulary (codebook size plus two stream ids), P pairs of a reference and what is trained to follow it in its voice.

    python loss.py      # shows the three alignments on a toy example
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import AlignmentError, CopyCollapseError

IGNORE_INDEX = -100

# Where the label of the token predicted at position t stands: at t + 1 ("shift", upstream's labels) or at t ("aligned",
# labels that were shifted beforehand).
Alignment = Literal["shift", "aligned"]

CONFIDENT_COPY = 0.9  # probability of the input token from which a prediction counts as a copy
MAX_COPY_SHARE = 0.5  # a sound model stays near 0, a collapsed one is near 1
MIN_COPY_POSITIONS = 32  # fewer positions than this say nothing


VOICE_TEMPERATURE = 0.1  # cosines of mean hidden states lie close together


@dataclass
class LossSums:
    """Cross-entropy sums (nats), target counts and right guesses of one or more micro-batches; add them with `+`."""

    text: Tensor  # [] float32
    audio: Tensor  # [K] float32
    eos: Tensor  # [] float32, the end-of-stream targets' part of `audio`
    num_text: Tensor  # [] float32
    num_audio: Tensor  # [K] float32
    num_eos: Tensor  # [] float32
    right_text: Tensor  # [] float32, targets that were the likeliest prediction
    right_audio: Tensor  # [K] float32
    right_eos: Tensor  # [] float32
    voices: Tensor | None = None  # [2] float32, of `consistency_sums`, where asked for

    def _values(self) -> list[Tensor]:
        return [value for f in fields(self) if (value := getattr(self, f.name)) is not None]

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(*map(torch.add, self._values(), other._values()))

    def detach(self) -> LossSums:
        return LossSums(*map(Tensor.detach, self._values()))

    def pack(self) -> Tensor:
        """All values in one vector [3 * K + 6], or [3 * K + 8] with voices, ready for one all-reduce."""
        return torch.cat([value.detach().flatten() for value in self._values()])

    @classmethod
    def unpack(cls, vector: Tensor) -> LossSums:
        K, num_more = divmod(len(vector) - 6, 3)
        parts = vector.split([1, K, 1] * 3 + [2] * (num_more > 0))
        return cls(*(part[0] if i % 3 != 1 and i < 9 else part for i, part in enumerate(parts)))


def text_targets(output, label_ids: Tensor, input_ids: Tensor, attention_mask: Tensor, ids: AudioIds) -> Tensor:
    """The labels of `output.logits`, position by position (not yet shifted).

    output:  the model's output, with `expanded_labels` [B, S] or, failing that, `expanded_input_ids` and
             `attention_mask` [B, S], from which the same labels are rebuilt. Nothing is ever cut to fit.
    label_ids, input_ids, attention_mask: [B, s], before expansion
    returns: [B, S] int64
    raises:  ValueError if labels and logits do not cover the same positions
    """
    labels = output.expanded_labels
    if labels is None:
        expanded, mask = output.expanded_input_ids, output.attention_mask.bool()
        labels = torch.full_like(expanded, IGNORE_INDEX)
        labels[mask & ids.is_text(expanded)] = label_ids[attention_mask.bool() & ids.is_text(input_ids)]
    if labels.shape != output.logits.shape[:2]:
        raise ValueError(f"labels cover {tuple(labels.shape)} positions, logits {tuple(output.logits.shape[:2])}")
    return labels


@dataclass(frozen=True)
class AudioIds:
    """The ids that tell audio from text, of `HiggsAudioConfig`."""

    audio_in_token: int
    audio_out_token: int
    stream_eos: int

    @classmethod
    def of(cls, config) -> AudioIds:
        return cls(config.audio_in_token_idx, config.audio_out_token_idx, config.audio_stream_eos_id)

    def is_text(self, ids: Tensor) -> Tensor:
        return (ids != self.audio_in_token) & (ids != self.audio_out_token)


@dataclass
class Scored:
    """Predictions beside what they are scored against, for one micro-batch; views, nothing is copied."""

    text_logits: Tensor  # [B, S', V]
    text_labels: Tensor  # [B, S']
    text_inputs: Tensor  # [B, S'], the token at the predicting position
    audio_logits: Tensor  # [N', K, C]
    audio_labels: Tensor  # [N', K]
    audio_inputs: Tensor  # [N', K]


def score(output, batch, ids: AudioIds, text: Alignment = "shift", audio: Alignment = "shift") -> Scored:
    """Put each prediction beside its target. batch: an `ExtendedHiggsAudioBatchInput`."""
    labels = text_targets(output, batch.label_ids, batch.input_ids, batch.attention_mask, ids)
    audio_labels, audio_inputs = batch.label_audio_ids.T, batch.audio_out_ids.T  # [N, K]
    if audio_labels.shape != output.audio_logits.shape[:2]:
        raise ValueError(
            f"audio labels cover {tuple(audio_labels.shape)} positions, logits {tuple(output.audio_logits.shape[:2])}"
        )
    now, then = slice(None, -1), slice(1, None)  # the official labels of a segment's first column are -100, so no
    every = slice(None)  # shifted target ever crosses from one segment into the next
    text_at, text_target = (now, then) if text == "shift" else (every, every)
    audio_at, audio_target = (now, then) if audio == "shift" else (every, every)
    return Scored(
        output.logits[:, text_at],
        labels[:, text_target],
        output.expanded_input_ids[:, text_at],
        output.audio_logits[audio_at],
        audio_labels[audio_target],
        audio_inputs[audio_at],
    )


MAX_LOGITS = 2**25  # so many are alive at once, in float32 128 MiB


def packed_sums(
    rows: Callable[[Tensor], Tensor],
    text_head: nn.Module,
    audio_head: nn.Module,
    packing,
    *,
    stream_eos: int,
    with_copies: bool,
    voice_sums: Callable[[Callable], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums of a packed batch, from logits of the supervised positions alone, in pieces of at most MAX_LOGITS.

    rows:    hidden states [n, D] of n sorted positions; see `TrainableHiggsAudioModel._forward_packed`
    packing: a `collate.Packing`
    voice_sums: gives `consistency_sums` from `rows`
    returns: `LossSums.pack`, part of the graph; `copy_counts` [2], zero unless asked for
    """
    text, _, right_text, _, text_copies = _stream_sums(rows, text_head, packing, "text", stream_eos, with_copies)
    audio, eos, right, right_eos, audio_copies = _stream_sums(rows, audio_head, packing, "audio", stream_eos, with_copies)
    supervised = packing.audio_targets != IGNORE_INDEX
    is_eos = packing.audio_targets == stream_eos
    counts = [eos[None], eos.new_full((1,), len(packing.text_rows)), supervised.sum(0), is_eos.sum()[None]]
    voices = [voice_sums(rows)] if voice_sums else []
    return torch.cat([text, audio, *counts, right_text, right, right_eos[None], *voices]), text_copies + audio_copies


def _stream_sums(rows, head: nn.Module, packing, stream: str, stream_eos: int, with_copies: bool) -> tuple[Tensor, ...]:
    """(nats [K], end-of-stream nats [], right guesses [K], end-of-stream ones [], copies [2]) of one stream.

    Where there are several pieces, each is computed again in the backward pass.
    """
    indices, targets, inputs = (getattr(packing, f"{stream}_{name}") for name in ("rows", "targets", "inputs"))
    size = max(1, MAX_LOGITS // head.out_features)
    total: tuple[Tensor, ...] | None = None
    for piece in zip(indices.split(size), targets.split(size), inputs.split(size)):
        run = functools.partial(_piece_sums, head=head, stream_eos=stream_eos, with_copies=with_copies)
        if len(indices) > size and torch.is_grad_enabled():
            sums = checkpoint(run, rows(piece[0]), *piece[1:], use_reentrant=False)
        else:
            sums = run(rows(piece[0]), *piece[1:])
        total = sums if total is None else tuple(map(torch.add, total, sums))
    return total


def _piece_sums(
    hidden: Tensor, targets: Tensor, inputs: Tensor, head: nn.Module, stream_eos: int, with_copies: bool
) -> tuple[Tensor, ...]:
    n, K = targets.shape
    logits = head(hidden).float().view(n * K, head.out_features // K)
    flat = targets.flatten()
    nats = F.cross_entropy(logits, flat, ignore_index=IGNORE_INDEX, reduction="none")
    copies = nats.new_zeros(2)
    if with_copies:
        with torch.no_grad():
            fed = inputs.flatten()
            candidates = (flat != IGNORE_INDEX) & (flat != fed)
            probability = (logits.gather(1, fed[:, None]).squeeze(1) - logits.logsumexp(1)).exp()
            copies = torch.stack([candidates.sum(), (candidates & (probability > CONFIDENT_COPY)).sum()]).float()
    is_eos, is_right = flat == stream_eos, (logits.detach().argmax(1) == flat).float()
    eos, right_eos = (nats.detach() * is_eos).sum(), (is_right * is_eos).sum()
    return nats.view(n, K).sum(0), eos, is_right.view(n, K).sum(0), right_eos, copies


def loss_sums(scored: Scored, stream_eos: int) -> LossSums:
    """Sums of cross-entropy in float32; zero, and still part of the graph, where there are no targets."""
    supervised = scored.text_labels != IGNORE_INDEX
    text_logits, text_labels = scored.text_logits[supervised], scored.text_labels[supervised]
    text = F.cross_entropy(text_logits.float(), text_labels, reduction="sum")
    N, K, C = scored.audio_logits.shape
    labels = scored.audio_labels
    nats = F.cross_entropy(
        scored.audio_logits.float().reshape(N * K, C), labels.reshape(N * K), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(N, K)
    is_eos = labels == stream_eos
    is_right = scored.audio_logits.argmax(-1) == labels  # [N, K], false where nothing is supervised
    return LossSums(
        text=text,
        audio=nats.sum(0),
        eos=(nats.detach() * is_eos).sum(),
        num_text=supervised.sum().float(),
        num_audio=(labels != IGNORE_INDEX).sum(0).float(),
        num_eos=is_eos.sum().float(),
        right_text=(text_logits.argmax(-1) == text_labels).sum().float(),
        right_audio=is_right.sum(0).float(),
        right_eos=(is_right & is_eos).sum().float(),
    )


def pool_voices(rows: Callable[[Tensor], Tensor], voices) -> tuple[Tensor, Tensor]:
    """Mean hidden states of each pair's trained audio [P, D], and of its reference [P, D], which gets no gradient; float32.

    rows: as in `packed_sums`; voices: a `collate.Voices`
    """
    with torch.no_grad():
        heard = _means(rows(voices.heard).float(), voices.heard_lengths)
    return _means(rows(voices.spoken).float(), voices.spoken_lengths), heard


def _means(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean of each piece of states [sum(lengths), D]; one by one, as adding by index is not deterministic on a GPU."""
    means = [piece.mean(0) for piece in states.split(lengths)] if lengths else []
    return torch.stack(means) if means else states[:0]


def num_comparable(speakers: Sequence[str]) -> int:
    """How many of so many pairs count: all of them, or none where there are fewer than two speakers to tell apart."""
    return len(speakers) if len(set(speakers)) > 1 else 0


def consistency_sums(spoken: Tensor, heard: Tensor, speakers: Sequence[str], first: int = 0) -> Tensor:
    """InfoNCE: which reference is whose, told by cosine from what follows it. References of one speaker are no rivals.

    spoken:   [P, D], of this rank's pairs
    heard:    [R, D], references of all ranks' pairs; `first` is where this rank's begin
    speakers: of all R pairs
    returns:  [2] float32: nats, and the pairs they were summed over; exactly 0 with fewer than two speakers
    """
    if len(spoken) == 0 or not num_comparable(speakers):
        return heard.new_zeros(2)
    names = {name: number for number, name in enumerate(speakers)}
    numbers = torch.tensor([names[name] for name in speakers], device=heard.device)
    own = torch.arange(first, first + len(spoken), device=heard.device)
    is_other = numbers[own, None] != numbers
    is_candidate = is_other.index_put((own - first, own), is_other.new_ones(()))
    cosines = F.normalize(spoken, dim=1) @ F.normalize(heard, dim=1).T
    logits = (cosines / VOICE_TEMPERATURE).masked_fill(~is_candidate, -torch.inf)
    nats = F.cross_entropy(logits, own, reduction="sum")
    return torch.stack([nats, nats.new_tensor(len(spoken))])


def combine(
    sums: LossSums,
    num_text: Tensor,
    num_audio: Tensor,
    text_weight: float = 1.0,
    audio_weight: float = 1.0,
    codebook_weights: Tensor | None = None,
) -> Tensor:
    """The loss of the module's docstring, a scalar; of a part of the batch it is that part's share.

    num_text: [], num_audio: [K], the global counts. A component without targets contributes exactly 0.
    codebook_weights: [K], normalised here to mean 1
    """
    if codebook_weights is None:
        codebook_weights = torch.ones_like(sums.audio)
    codebook_weights = codebook_weights / codebook_weights.mean()
    text = sums.text / num_text.clamp(min=1)
    audio = (codebook_weights * sums.audio / num_audio.clamp(min=1)).mean()
    return text_weight * text + audio_weight * audio


@dataclass(frozen=True)
class Objective:
    """The scalar that trains, from sums and global counts: `combine` with its weights, and the voice term."""

    text_weight: float = 1.0
    audio_weight: float = 1.0
    codebook_weights: tuple[float, ...] | None = None  # one per codebook; None: equal
    consistency_weight: float = 0.0

    def __call__(self, sums: LossSums, num_text: Tensor, num_audio: Tensor, num_voices: float = 0.0) -> Tensor:
        weights = None if self.codebook_weights is None else sums.audio.new_tensor(self.codebook_weights)
        value = combine(sums, num_text, num_audio, self.text_weight, self.audio_weight, weights)
        if sums.voices is None:
            return value
        return value + self.consistency_weight * sums.voices[0] / max(1.0, num_voices)

    def metrics(self, sums: LossSums) -> dict:
        """Losses in nats per target and shares of right guesses, from global sums; None where nothing was supervised.

        The consistency loss, in nats per voice, is among them where it was computed.
        """

        def ratio(total: Tensor, count: Tensor) -> float | None:
            return (total / count).item() if count > 0 else None

        codebooks = [ratio(s, n) for s, n in zip(sums.audio, sums.num_audio)]
        supervised = [value for value in codebooks if value is not None]
        has_voices = sums.voices is not None
        num_voices = sums.voices[1].item() if has_voices else 0.0
        voices = {"consistency_loss": ratio(*sums.voices) or 0.0} if has_voices else {}
        return {
            "loss": self(sums, sums.num_text, sums.num_audio, num_voices).item(),
            "text_loss": ratio(sums.text, sums.num_text) or 0.0,
            "audio_loss": sum(supervised) / len(supervised) if supervised else 0.0,
            "codebook_losses": codebooks,
            "eos_loss": ratio(sums.eos, sums.num_eos),
            "text_accuracy": ratio(sums.right_text, sums.num_text),
            "audio_accuracy": ratio(sums.right_audio.sum(), sums.num_audio.sum()),
            "codebook_accuracies": [ratio(s, n) for s, n in zip(sums.right_audio, sums.num_audio)],
            "eos_accuracy": ratio(sums.right_eos, sums.num_eos),
            "text_targets": int(sums.num_text.item()),
            "audio_targets": int(sums.num_audio.sum().item()),
            **voices,
        }


def find_alignment(labels: Tensor, inputs: Tensor, what: str) -> Alignment | None:
    """Where the labels stand relative to the inputs they were made from.

    labels, inputs: [rows, positions]
    returns: None if nothing is supervised
    raises:  AlignmentError, showing the first positions that fit neither alignment
    """
    supervised = labels != IGNORE_INDEX
    if not supervised.any():
        return None
    if (labels == inputs)[supervised].all():
        return "shift"
    successors = torch.cat([inputs[:, 1:], torch.full_like(inputs[:, :1], IGNORE_INDEX)], dim=1)
    if (labels == successors)[supervised].all():
        return "aligned"
    wrong = (supervised & (labels != inputs)).nonzero()[:5].tolist()
    shown = "; ".join(
        f"row {r} position {p}: label {labels[r, p]}, input {inputs[r, p]}, next input {successors[r, p]}" for r, p in wrong
    )
    raise AlignmentError(f"{what} labels are neither the inputs nor the inputs one position later: {shown}")


def copy_counts(scored: Scored) -> Tensor:
    """How often the model predicts what it was just fed, where that is wrong.

    returns: [2] float32: positions whose target differs from their input, and those of them at which the model gives the
             input a probability above CONFIDENT_COPY. Slowly changing codes make a sound model repeat itself too, but
             not with that confidence where the next code differs.
    """
    changed = num_copied = scored.audio_logits.new_zeros((), dtype=torch.float32)
    streams = (
        (scored.text_logits, scored.text_labels, scored.text_inputs),
        (scored.audio_logits, scored.audio_labels, scored.audio_inputs),
    )
    for logits, labels, inputs in streams:
        if labels.numel() == 0:
            continue
        # An audio placeholder is not a token the text head could copy; a stream id is one for the audio head.
        candidates = (labels != IGNORE_INDEX) & (labels != inputs)
        logits, inputs = logits[candidates].float(), inputs[candidates]
        probability = logits.softmax(-1).gather(-1, inputs[:, None])
        changed = changed + candidates.sum()
        num_copied = num_copied + (probability > CONFIDENT_COPY).sum()
    return torch.stack([changed, num_copied])


def copy_share(counts: Tensor) -> float:
    """The share of `copy_counts` summed over micro-batches and ranks; raises CopyCollapseError when it is too high."""
    changed, copied = counts.tolist()
    share = copied / max(1.0, changed)
    if changed >= MIN_COPY_POSITIONS and share > MAX_COPY_SHARE:
        raise CopyCollapseError(
            f"at {share:.0%} of {changed:.0f} supervised positions the model predicts the token it was just fed instead of "
            "the next one. These weights were trained on unshifted labels; their loss looks low and they generate silence. "
            "Start again from the published checkpoint."
        )
    return share


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
