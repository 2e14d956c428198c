"""The official collator, extended: copies, any device, clamped audio indices, a batch that knows its targets.

`ExtendedHiggsAudioSampleCollator` repairs the samples, hands copies of them to the official
`HiggsAudioSampleCollator`, and adds what that leaves out:

- The official one writes -100 into the caller's labels, so a sample collated twice loses its audio targets: it gets
  copies.
- It builds stream ids without a device: samples are moved to the CPU, `batch.to(device)` moves the result.
- More `<|AUDIO|>`/`<|AUDIO_OUT|>` placeholders than clips is an index error there. Here it is a CollateError, or with
  `strict=False` the index is clamped to the last clip, the sample is named, and none of its targets trains.
- Its Whisper path looks waveforms up by the wrong index as soon as an audio-out turn precedes an audio-in turn or a
  clip is longer than one chunk. Here long clips are cut beforehand and features are computed in placeholder order.
- `audio_label_ids_concat` becomes the labels when a sample has it.

Legend: B batch, s text positions before expansion, K codebooks, T frames, N audio positions in the batch.

    python collate.py      # a small batch: what is fed, and its labels
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from boson_multimodal.model.higgs_audio.utils import build_delay_pattern_mask
from torch import Tensor
from torch.nn import functional
from transformers import WhisperFeatureExtractor

from common import CollateError
from loss import IGNORE_INDEX, Targets
from prepare import whisper
from prepare.audio import starts

NEAR_FRAMES = 2  # before a change of speaker, and from it on: those in which a codebook may switch early or late

# ---------------------------------------------------------------------------------------------------------------------
# The packed layout


class Layout(NamedTuple):
    """How the layers see a batch: T real positions, sorted by what they hold, text before audio.

    num_text      of the T positions
    perm          [T] int64, sorted position -> index in the packed sequence
    inverse_perm  [T] int64, index in the packed sequence -> sorted position
    lengths       positions of each sample
    cu_seqlens    [samples + 1] int32, where each sample begins in the packed sequence
    """

    num_text: int
    perm: Tensor
    inverse_perm: Tensor
    lengths: list[int]
    cu_seqlens: Tensor


@dataclass
class Packing:
    """A batch as one sequence: its samples one after the other without padding, each placeholder replaced by its columns.

    The model keeps the positions sorted, because text and audio go through different FFNs: text first, then the columns
    of `audio_in_ids`, then those of `audio_out_ids`. Two samples, t for text and a for an audio column:

        packed sequence            t  t  a  a  t | t  a  a
        index                      0  1  2  3  4   5  6  7       cu_seqlens 0 5 8
        sorted                     t  t  t  t  a  a  a  a        num_text 4
        perm                       0  1  4  5  2  3  6  7
        inverse_perm               0  1  4  5  2  3  6  7        (here a swap, so its own inverse)
        position_ids               0  1  2  3  4   0  1  2       within the sample

    All of it follows from the ids, so it is computed where the batch is made, and the device is never asked.

    text_ids      [num_text] int64
    position_ids  [T] int64, of each packed position within its sample
    layout        see `Layout`
    text, audio   what the heads predict; rows are sorted positions
    """

    text_ids: Tensor
    position_ids: Tensor
    layout: Layout
    text: Targets
    audio: Targets

    @property
    def num_positions(self) -> int:
        return len(self.position_ids)

    @property
    def num_pairs(self) -> int:
        """Pairs of a position and one that it attends to: itself and those before it in its sample."""
        return sum(length * (length + 1) // 2 for length in self.layout.lengths)

    def work(self) -> tuple[int, int, int, int]:
        """Positions, pairs, text targets, audio rows; see `metrics.Flops.total`."""
        return self.num_positions, self.num_pairs, len(self.text.rows), len(self.audio.rows)

    @classmethod
    def of(cls, batch: Batch, audio_in_token: int, audio_out_token: int) -> Packing:
        """The packing of a collated batch whose audio is all given as codes."""
        ids, attended = batch.input_ids, batch.attention_mask.bool()
        is_in, is_out = (ids == token for token in (audio_in_token, audio_out_token))
        in_lengths = _clip_lengths(batch.audio_in_ids_start, batch.audio_in_ids)
        out_lengths = _clip_lengths(batch.audio_out_ids_start, batch.audio_out_ids)
        counts = attended.long()  # [B, s], packed positions of each id
        counts[is_in], counts[is_out] = in_lengths, out_lengths
        begins = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)

        is_text = attended & ~is_in & ~is_out
        columns = [_columns(begins[mask], lengths) for mask, lengths in ((is_in, in_lengths), (is_out, out_lengths))]
        perm = torch.cat([begins[is_text], *columns])
        inverse_perm = torch.empty_like(perm).scatter_(0, perm, torch.arange(len(perm)))
        lengths = counts.sum(1)
        cu_seqlens = functional.pad(lengths.cumsum(0), (1, 0))
        layout = Layout(int(is_text.sum()), perm, inverse_perm, lengths.tolist(), cu_seqlens.int())
        sample_begins = cu_seqlens[:-1].repeat_interleave(lengths)  # of each packed position
        return cls(
            text_ids=ids[is_text],
            position_ids=torch.arange(len(perm)) - sample_begins,
            layout=layout,
            text=_text_targets(batch, is_text, layout, audio_out_token),
            audio=_audio_targets(batch, first=layout.num_text + len(columns[0])),
        )


def _text_targets(batch: Batch, is_text: Tensor, layout: Layout, audio_out_token: int) -> Targets:
    """Text that is predicted from the position before it, which may be audio; is_text: [B, s] bool"""
    T, places = len(layout.perm), layout.perm[: layout.num_text]
    tokens, labels = torch.full((T,), audio_out_token), torch.full((T,), IGNORE_INDEX)
    tokens[places] = batch.input_ids[is_text]
    if batch.label_ids is not None:
        labels[places] = batch.label_ids[is_text]
    is_real = torch.tensor(layout.lengths) > 0
    labels[layout.cu_seqlens[:-1][is_real].long()] = IGNORE_INDEX  # nothing predicts a sample's first token
    predicting = (labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)
    return Targets(layout.inverse_perm[predicting], labels[predicting + 1, None], tokens[predicting, None])


def _audio_targets(batch: Batch, first: int) -> Targets:
    """Codes that are predicted from the column before them; first: the sorted position of the first output column"""
    codes, labels = batch.audio_out_ids, batch.label_audio_ids
    if labels is None:
        labels = torch.full_like(codes, IGNORE_INDEX)
    # Column 0 of every clip is IGNORE_INDEX in the official labels, so no clip predicts the next one's first.
    trained = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    near = None if batch.near_changes is None else batch.near_changes[:, trained + 1].T.contiguous()
    return Targets(first + trained, labels[:, trained + 1].T.contiguous(), codes[:, trained].T.contiguous(), near)


def _clip_lengths(starts: Tensor | None, codes: Tensor | None) -> Tensor:
    """Columns of each clip, from where they start in their concatenation."""
    if starts is None or codes is None:
        return torch.zeros(0, dtype=torch.long)
    return torch.diff(starts, append=torch.tensor([codes.shape[1]])) if len(starts) else starts


def _columns(starts: Tensor, lengths: Tensor) -> Tensor:
    """Packed indices of all clips' columns, one clip after the other."""
    before = lengths.cumsum(0) - lengths
    return (starts - before).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


@dataclass
class Voices:
    """Pairs for the voice-consistency loss: one speaker's reference and trained audio in one sample.

    The reference is audio without targets that comes before the speaker's first trained clip. Clips of unknown speakers, and
    speakers who lack one of the two, are left out.

    speakers            of each pair
    reference, trained  [columns] int64, sorted positions, pair after pair
    reference_lengths, trained_lengths   columns of each pair
    """

    speakers: list[str]
    reference: Tensor
    trained: Tensor
    reference_lengths: list[int]
    trained_lengths: list[int]

    @classmethod
    def of(cls, batch: Batch, speakers: Sequence[Sequence[str | None]], audio_in_token: int, audio_out_token: int) -> Voices:
        """speakers: of each sample's clips, in the order of their placeholders; further clips have none"""
        in_lengths = _clip_lengths(batch.audio_in_ids_start, batch.audio_in_ids).tolist()
        out_lengths = _clip_lengths(batch.audio_out_ids_start, batch.audio_out_ids).tolist()
        first = batch.packing.layout.num_text
        columns = (first + torch.arange(sum(in_lengths) + sum(out_lengths))).split(in_lengths + out_lengths)
        is_target = (batch.label_audio_ids != IGNORE_INDEX).any(0).split(out_lengths)
        clips = {
            audio_in_token: iter([(column, False) for column in columns[: len(in_lengths)]]),
            audio_out_token: iter([(c, bool(t.any())) for c, t in zip(columns[len(in_lengths) :], is_target)]),
        }
        reference: dict[tuple[int, str], list[Tensor]] = {}
        trained: dict[tuple[int, str], list[Tensor]] = {}
        for row, (ids, names) in enumerate(zip(batch.input_ids.tolist(), speakers)):
            placeholders = (token for token in ids if token in clips)
            for token, name in zip(placeholders, itertools.chain(names, itertools.repeat(None))):
                column, is_trained = next(clips[token])
                if is_trained and name is not None:
                    trained.setdefault((row, name), []).append(column)
                elif name is not None and (row, name) not in trained:
                    reference.setdefault((row, name), []).append(column)
        pairs = [voice for voice in trained if voice in reference]
        before, after = ([torch.cat(where[voice]) for voice in pairs] for where in (reference, trained))
        none = torch.zeros(0, dtype=torch.long)
        names = [name for _, name in pairs]
        return cls(names, torch.cat([none, *before]), torch.cat([none, *after]), list(map(len, before)), list(map(len, after)))


# ---------------------------------------------------------------------------------------------------------------------
# The batch


@dataclass
class Batch(HiggsAudioBatchInput):
    """A batch of the official collator, with its targets and where its samples came from.

    input_ids, attention_mask, label_ids      [B, s] int64
    audio_out_ids, label_audio_ids            [K, N_out] int64, delayed, with stream ids
    audio_out_ids_start                       [num_audio_out] int64; ..._group_loc: the row of each clip
    audio_in_ids                              [K, N_in] int64;  audio_in_ids_start  [num_audio_in] int64
    audio_features                            [num_audio_in, mel_bins, mel_frames] float32, with Whisper only
    audio_feature_attention_mask              [num_audio_in, mel_frames] int32, with Whisper only
    """

    sources: list[str] = field(default_factory=list)  # where each row came from, for error messages
    unreadable: list[str] = field(default_factory=list)  # what is wrong with samples that are left out
    clamped: list[str] = field(default_factory=list)  # what is wrong with samples that are here but do not train
    num_frames: int = 0  # of audio, without stream ids and delay columns
    has_label_overrides: bool = False  # some labels came from `audio_label_ids_concat`, not from the inputs
    near_changes: Tensor | None = None  # [K, N_out] bool, codes of frames around a change of speaker; None without any
    packing: Packing | None = None  # the same batch as one sequence; None where the audio comes through Whisper
    voices: Voices | None = None  # for the voice-consistency loss; None where it is off

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return _mapped(self, Tensor.pin_memory)

    def model_inputs(self) -> dict:
        """The keyword arguments of `HiggsAudioModel.forward`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(HiggsAudioBatchInput) if f.name != "reward"}

    def num_targets(self) -> tuple[Tensor, Tensor]:
        """How many next-token targets the labels hold: text [] and audio [K], int64.

        Labels are input-aligned, so nothing predicts the first position and it never counts.
        """
        text = (self.label_ids[:, 1:] != IGNORE_INDEX).sum()
        K = self.audio_out_ids.shape[0]
        if self.label_audio_ids.numel() == 0:
            return text, text.new_zeros(K)
        return text, (self.label_audio_ids[:, 1:] != IGNORE_INDEX).sum(dim=1)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with `function` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):  # a NamedTuple
        return type(value)(*(_mapped(item, function) for item in value))
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{name: _mapped(item, function) for name, item in vars(value).items()})
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The collator


class ExtendedHiggsAudioSampleCollator(HiggsAudioSampleCollator):
    """Collates `ChatMLDatasetSample`s; see the module's docstring for what differs from the official collator.

    feature_extractor: computes the audio tower's input; None when Whisper is off.
    feature_shape:     (mel_bins, mel_frames) of the model's audio tower, which wants (perhaps empty) features in every
                       batch; None for a model without one.
    strict:            more placeholders than clips is an error instead of a clamped index.
    with_voices:       batches get their `Voices`, from the samples' `speakers`.
    Other arguments are the official collator's. Where audio comes through Whisper or input audio is not read at all, a
    batch has no `Packing`.
    """

    def __init__(
        self,
        *,
        feature_extractor: WhisperFeatureExtractor | None = None,
        feature_shape: tuple[int, int] | None = None,
        strict: bool = True,
        with_voices: bool = False,
        **kwargs,
    ):
        super().__init__(whisper_processor=None, encode_whisper_embed=False, **kwargs)
        self.has_packing = feature_shape is None and self.return_audio_in_tokens
        self.feature_extractor = feature_extractor
        self.feature_shape = feature_shape
        self.strict = strict
        self.with_voices = with_voices

    def __call__(self, batch: Sequence[ChatMLDatasetSample]) -> Batch:
        if not batch:
            raise CollateError("cannot collate an empty batch")
        sources = [getattr(sample, "source", "") or f"sample {i}" for i, sample in enumerate(batch)]
        clamped: list[str] = []
        samples = [self._clamp(self._copy(sample), source, clamped) for sample, source in zip(batch, sources)]
        if self.feature_extractor:
            samples = [self._cut_long_audio(sample) for sample in samples]
        if len({sample.label_ids is None for sample in samples}) > 1:
            raise CollateError("a batch mixes samples with and without labels")

        # The official collator changes its samples' labels, and which audio turns train has to be known afterwards.
        copies = [dataclasses.replace(s, label_ids=None if s.label_ids is None else s.label_ids.clone()) for s in samples]
        official = super().__call__(copies)
        result = Batch(**vars(official), sources=sources, clamped=clamped)
        rows = [row for row, s in enumerate(samples) for _ in range(int((s.input_ids == self.audio_out_token_id).sum()))]
        result.audio_out_ids_start_group_loc = torch.tensor(rows, dtype=torch.long)
        if result.audio_out_ids.shape[-1] == 0:
            result.audio_out_ids = torch.zeros((self.audio_num_codebooks or 0, 0), dtype=torch.long)
            if result.label_audio_ids is not None:
                result.label_audio_ids = result.audio_out_ids.clone()
        if result.label_audio_ids is not None and not self.disable_audio_codes_transform:
            self._override_labels(result, samples)
        if self.feature_shape is not None:
            features = whisper.features(samples, self.feature_extractor, self.feature_shape)
            result.audio_features, result.audio_feature_attention_mask = features
        result.near_changes = self._near_changes(result, [getattr(sample, "changes", ()) for sample in batch])
        result.num_frames = self._count_frames(result)
        tokens = self.audio_in_token_id, self.audio_out_token_id
        if self.has_packing:
            result.packing = Packing.of(result, *tokens)
        if self.with_voices:
            result.voices = Voices.of(result, [getattr(sample, "speakers", ()) for sample in batch], *tokens)
        return result

    @property
    def _num_extra(self) -> int:
        """Columns of a clip beyond its frames: stream ids and delay."""
        return 1 + self.audio_num_codebooks if self.use_delay_pattern else 2

    def _count_frames(self, batch: Batch) -> int:
        pairs = ((batch.audio_in_ids, batch.audio_in_ids_start), (batch.audio_out_ids, batch.audio_out_ids_start))
        return sum(ids.shape[1] - len(starts) * self._num_extra for ids, starts in pairs if ids is not None)

    def num_positions(self, num_ids: int, clips: Sequence[tuple[int, bool]]) -> int:
        """Positions of a sample after expansion, from the number of its ids and its clips' (frames, whether audio-out).

        raises: CollateError with Whisper, whose features depend on the waveforms
        """
        if self.feature_extractor:
            raise CollateError("a checkpoint with Whisper: lengths are not known beforehand; use --batch_size")
        extra = self._num_extra - 1  # the placeholder itself is one of the ids
        return num_ids + sum(frames + extra for frames, is_out in clips if is_out or self.return_audio_in_tokens)

    def _copy(self, sample: ChatMLDatasetSample) -> ChatMLDatasetSample:
        """A copy on the CPU in which absent audio is an empty tensor."""
        K = self.audio_num_codebooks or 0
        no_ids, no_samples = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        empty = {"audio_ids_concat": no_ids.reshape(K, 0), "audio_waveforms_concat": no_samples, "audio_sample_rate": no_samples}
        empty |= dict.fromkeys(("audio_ids_start", "audio_waveforms_start", "audio_speaker_indices"), no_ids)
        values = {f.name: getattr(sample, f.name) for f in dataclasses.fields(ChatMLDatasetSample)}
        values = {n: v.detach().cpu() if isinstance(v, Tensor) else v for n, v in values.items()}
        values |= {n: default for n, default in empty.items() if values[n] is None or values[n].numel() == 0}
        return ChatMLDatasetSample(**values)

    def _placeholders(self, sample: ChatMLDatasetSample) -> Tensor:
        """Positions of `<|AUDIO|>` and `<|AUDIO_OUT|>` in the sample, in order."""
        ids = sample.input_ids
        return ((ids == self.audio_in_token_id) | (ids == self.audio_out_token_id)).nonzero().squeeze(1)

    def _clamp(self, sample: ChatMLDatasetSample, source: str, clamped: list[str]) -> ChatMLDatasetSample:
        """Give every placeholder a clip: those beyond the clips repeat the last one, and nothing of the sample trains.

        clamped: gets a message for such a sample
        raises:  CollateError instead, if strict
        """
        positions = self._placeholders(sample)
        is_out = sample.input_ids[positions] == self.audio_out_token_id
        # Codes are in the order of all placeholders (a checkpoint that reads no audio-in tokens may lack those after
        # the last audio-out), waveforms in the order of the audio-in placeholders alone.
        needs_codes = is_out | torch.tensor(self.return_audio_in_tokens)
        num_needed = int(needs_codes.nonzero().max()) + 1 if needs_codes.any() else 0
        extra_codes = max(0, num_needed - len(sample.audio_ids_start))
        num_waveforms = int((~is_out).sum()) if self.feature_extractor else 0
        extra_waveforms = max(0, num_waveforms - len(sample.audio_waveforms_start))
        if not extra_codes and not extra_waveforms:
            return sample
        what, missing = ("clip", extra_codes) if extra_codes else ("waveform", extra_waveforms)
        needed = num_needed if extra_codes else num_waveforms
        problem = f"{source}: {needed} audio placeholders but {needed - missing} {what}(s)"
        if self.strict:
            remedy = "Give each <|AUDIO|> and <|AUDIO_OUT|> its audio (a wav file where Whisper is on)"
            raise CollateError(f"{problem}. {remedy}, and check that no text contains these tokens literally")
        clamped.append(f"{problem}; it does not train")
        labels = None if sample.label_ids is None else torch.full_like(sample.label_ids, IGNORE_INDEX)
        repaired = dataclasses.replace(sample, label_ids=labels, audio_label_ids_concat=None)
        _repeat_last(repaired, "ids", extra_codes, nothing=torch.zeros((self.audio_num_codebooks, 1), dtype=torch.long))
        _repeat_last(repaired, "waveforms", extra_waveforms, nothing=torch.zeros(1))
        rates = [*sample.audio_sample_rate.tolist(), *[16000.0] * extra_waveforms]  # nothing trains: any rate will do
        repaired.audio_sample_rate = torch.tensor(rates[: len(repaired.audio_waveforms_start)])
        return repaired

    def _cut_long_audio(self, sample: ChatMLDatasetSample) -> ChatMLDatasetSample:
        positions = self._placeholders(sample)
        is_out = sample.input_ids[positions] == self.audio_out_token_id
        return whisper.cut_long_audio(sample, dict(zip(positions.tolist(), is_out.tolist())), self.feature_extractor)

    def _override_labels(self, batch: Batch, samples: list[ChatMLDatasetSample]) -> None:
        """Write the label audio of samples that bring their own over the official, input-derived labels."""
        clip = 0
        for sample in samples:
            for index, position in enumerate(self._placeholders(sample).tolist()):
                if sample.input_ids[position] != self.audio_out_token_id:
                    continue
                start = int(batch.audio_out_ids_start[clip])
                clip += 1
                if sample.audio_label_ids_concat is None or sample.label_ids[position] == IGNORE_INDEX:
                    continue
                labels = self._delayed_labels(sample.get_audio_codes_labels(index)[: self.audio_num_codebooks])
                batch.label_audio_ids[:, start : start + labels.shape[1]] = labels
                batch.has_label_overrides = True

    def _delayed_labels(self, codes: Tensor) -> Tensor:
        """codes: [K, T]; returns input-aligned labels [K, T + 2], or [K, T + K + 1] with the delay pattern."""
        labels = functional.pad(codes, (1, 0), value=IGNORE_INDEX)
        labels = functional.pad(labels, (0, 1), value=self.audio_stream_eos_id)
        if not self.use_delay_pattern:
            return labels
        return build_delay_pattern_mask(labels[None], bos_token_id=IGNORE_INDEX, pad_token_id=IGNORE_INDEX)[0][0]

    def _near_changes(self, batch: Batch, changes: Sequence[Sequence[int]]) -> Tensor | None:
        """changes: of each sample, the frames of its last clip with which another speaker begins"""
        if not any(changes):
            return None
        near = torch.zeros_like(batch.audio_out_ids, dtype=torch.bool)
        starts, stops = batch.audio_out_ids_start.tolist(), [*batch.audio_out_ids_start.tolist()[1:], near.shape[1]]
        last = dict(zip(batch.audio_out_ids_start_group_loc.tolist(), zip(starts, stops)))  # clip of each row
        for row, frame in ((row, frame) for row, frames in enumerate(changes) if row in last for frame in frames):
            for k in range(len(near)):
                column = last[row][0] + 1 + frame + k * self.use_delay_pattern
                near[k, max(last[row][0], column - NEAR_FRAMES) : min(last[row][1], column + NEAR_FRAMES)] = True
        return near


def _repeat_last(sample: ChatMLDatasetSample, kind: str, count: int, nothing: Tensor) -> None:
    """Add `count` clips ("ids" or "waveforms") to a sample: its last one again, `nothing` where it has none."""
    if not count:
        return
    whole, begins = (getattr(sample, f"audio_{kind}_{name}") for name in ("concat", "start"))
    pieces = list(torch.tensor_split(whole, begins[1:], dim=-1)) if len(begins) else []
    pieces += [pieces[-1] if pieces else nothing] * count
    setattr(sample, f"audio_{kind}_concat", torch.cat(pieces, dim=-1))
    setattr(sample, f"audio_{kind}_start", starts(pieces))


def create_collator(
    config: HiggsAudioConfig, *, strict: bool = True, with_voices: bool = False
) -> ExtendedHiggsAudioSampleCollator:
    """The collator a checkpoint was made for.

    raises: CollateError if the checkpoint does not read the codes that `with_voices` compares
    """
    has_tower = not config.skip_audio_tower
    if with_voices and (has_tower or not config.encode_audio_in_tokens):
        problem = "this checkpoint does not read reference codes (skip_audio_tower=false or encode_audio_in_tokens=false)"
        raise CollateError(f"{problem}, which the voice-consistency loss compares; leave out --consistency_loss_weight")
    extractor = whisper.feature_extractor(config) if has_tower else None
    return ExtendedHiggsAudioSampleCollator(
        feature_extractor=extractor if config.encode_whisper_embed else None,
        feature_shape=(extractor.feature_size, extractor.nb_max_frames) if extractor else None,
        strict=strict,
        with_voices=with_voices,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        pad_token_id=config.pad_token_id,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        audio_num_codebooks=config.audio_num_codebooks,
        return_audio_in_tokens=config.encode_audio_in_tokens,
        use_delay_pattern=config.use_delay_pattern,
    )


def main() -> None:
    """A text of three tokens and a clip of four frames: what is fed, and its labels."""
    config = HiggsAudioConfig(skip_audio_tower=True, encode_audio_in_tokens=True, use_delay_pattern=True)
    clip, K = config.audio_out_token_idx, config.audio_num_codebooks
    ids, labels = torch.tensor([11, 12, 13, clip, 14]), torch.tensor([-100, -100, -100, clip, 14])
    sample = ChatMLDatasetSample(ids, labels, torch.arange(4).expand(K, 4), torch.tensor([0]), *[None] * 4)
    batch = create_collator(config)([sample])
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            print(f"{name:30} {tuple(value.shape)} {value.dtype}")
    text, audio = batch.num_targets()
    print(f"\ntext targets {text.item()}, audio targets per codebook {audio.tolist()}")
    print(f"fed, a row per codebook:\n{batch.audio_out_ids}\nlabels:\n{batch.label_audio_ids}")


if __name__ == "__main__":
    main()
