"""The official collator, extended: copies, any device, clamped audio indices, a batch that knows its targets.

`ExtendedHiggsAudioSampleCollator` repairs the samples, hands copies of them to the official
`HiggsAudioSampleCollator`, and adds what that leaves out:

- The official one writes -100 into the caller's labels, so a sample collated twice loses its audio targets: it gets copies.
- It builds stream ids without a device: samples are moved to the CPU, `batch.to(device)` moves the result.
- More `<|AUDIO|>`/`<|AUDIO_OUT|>` placeholders than clips is an index error there; here the index is clamped to the last
  clip, counted and reported by sample, and never trained on. `strict=True` makes it an error.
- Its Whisper path looks waveforms up by the wrong index as soon as an audio-out turn precedes an audio-in turn or a
  clip is longer than one chunk; here long clips are cut beforehand and the features are computed in placeholder order.
- `audio_label_ids_concat` becomes the labels when a sample has it.

Legend: B batch, s text positions before expansion, K codebooks, T frames, N audio positions in the batch.

    python collate.py      # a small batch: what is fed, and its labels
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import librosa
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from boson_multimodal.model.higgs_audio.utils import build_delay_pattern_mask
from torch import Tensor
from transformers import WhisperFeatureExtractor

from common import CollateError

IGNORE_INDEX = -100


@dataclass
class Packing:
    """A batch as one sequence: its samples one after the other without padding, each placeholder replaced by its columns.

    The model keeps the positions sorted by what they hold, text before audio, because the two go through different FFNs:
    T positions, num_text of them text, then the columns of `audio_in_ids` and those of `audio_out_ids`, in their order.
    Everything is known from the ids, so it is computed where the batch is made, and the device is never asked.

    text_ids      [num_text] int64
    in_sequence   [T] int64, where in the sequence each sorted position stands; to_sorted [T] is its inverse
    position_ids  [T] int64, of each sorted position within its sample
    lengths       positions of each sample; offsets [samples + 1] int32, where each begins in the sequence
    in_rows       [T] int64, where in padded rows of row_length each place of the sequence stands, if attention is to work
                  on rows instead of on the sequence
    text_rows     [text targets] int64, sorted positions that predict a text target
    text_targets, text_inputs      [text targets, 1] int64, the target and the token that is fed at the position
    audio_rows    [audio rows] int64, sorted positions that predict at least one code
    audio_targets, audio_inputs    [audio rows, K] int64; targets of codebooks that are not trained there are IGNORE_INDEX
    """

    text_ids: Tensor
    in_sequence: Tensor
    to_sorted: Tensor
    position_ids: Tensor
    lengths: list[int]
    offsets: Tensor
    text_rows: Tensor
    text_targets: Tensor
    text_inputs: Tensor
    audio_rows: Tensor
    audio_targets: Tensor
    audio_inputs: Tensor
    in_rows: Tensor | None = None
    row_length: int = 0

    @property
    def num_text(self) -> int:
        return len(self.text_ids)

    @property
    def num_positions(self) -> int:
        return len(self.in_sequence)

    @property
    def num_pairs(self) -> int:
        """Of a position and one that it attends to: itself and those before it in its sample."""
        return sum(length * (length + 1) // 2 for length in self.lengths)

    @property
    def num_places(self) -> int:
        """Positions that attention works on, with padding."""
        return len(self.lengths) * self.row_length or self.num_positions

    def work(self) -> tuple[int, int, int, int]:
        """What has to be computed: positions, pairs, text targets, audio rows; see `metrics.Flops.total`."""
        return self.num_positions, self.num_pairs, len(self.text_rows), len(self.audio_rows)

    @classmethod
    def of(cls, batch: ExtendedHiggsAudioBatchInput, audio_in_token: int, audio_out_token: int) -> Packing:
        """The packing of a collated batch whose audio is all given as codes."""
        ids, attended = batch.input_ids, batch.attention_mask.bool()
        is_in, is_out = (ids == token for token in (audio_in_token, audio_out_token))
        in_lengths = _clip_lengths(batch.audio_in_ids_start, batch.audio_in_ids)
        out_lengths = _clip_lengths(batch.audio_out_ids_start, batch.audio_out_ids)
        counts = attended.long()
        counts[is_in], counts[is_out] = in_lengths, out_lengths
        starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
        offsets = torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0))

        is_text = attended & ~is_in & ~is_out
        columns = [_columns(starts[mask], lengths) for mask, lengths in ((is_in, in_lengths), (is_out, out_lengths))]
        in_sequence = torch.cat([starts[is_text], *columns])
        T, num_text, num_in = len(in_sequence), int(is_text.sum()), len(columns[0])
        to_sorted = torch.empty_like(in_sequence).scatter_(0, in_sequence, torch.arange(T))
        first = offsets[:-1].repeat_interleave(counts.sum(1))  # of the sample of each place in the sequence

        tokens, labels = torch.full((T,), audio_out_token), torch.full((T,), IGNORE_INDEX)
        tokens[in_sequence[:num_text]] = ids[is_text]
        if batch.label_ids is not None:
            labels[in_sequence[:num_text]] = batch.label_ids[is_text]
        labels[offsets[:-1][counts.sum(1) > 0]] = IGNORE_INDEX  # nobody predicts a sample's first token
        predicting = (labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)

        codes, code_labels = batch.audio_out_ids, batch.label_audio_ids
        if code_labels is None:
            code_labels = torch.full_like(codes, IGNORE_INDEX)
        # Column 0 of every clip is IGNORE_INDEX in the official labels, so no clip predicts the next one's first.
        trained = (code_labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)
        return cls(
            text_ids=ids[is_text],
            in_sequence=in_sequence,
            to_sorted=to_sorted,
            position_ids=in_sequence - first[in_sequence],
            lengths=counts.sum(1).tolist(),
            offsets=offsets.int(),
            text_rows=to_sorted[predicting],
            text_targets=labels[predicting + 1, None],
            text_inputs=tokens[predicting, None],
            audio_rows=num_text + num_in + trained,
            audio_targets=code_labels[:, trained + 1].T.contiguous(),
            audio_inputs=codes[:, trained].T.contiguous(),
        )

    def with_rows(self, round_to: int) -> Packing:
        """The same with a padded row for each sample."""
        lengths = torch.tensor(self.lengths)
        row_length = math.ceil(max(self.lengths) / round_to) * round_to
        gaps = torch.arange(len(lengths)) * row_length - self.offsets[:-1]
        in_rows = torch.arange(self.num_positions) + gaps.repeat_interleave(lengths)
        return dataclasses.replace(self, in_rows=in_rows, row_length=row_length)


def _clip_lengths(starts: Tensor | None, codes: Tensor | None) -> Tensor:
    """Columns of each clip, from where they start in their concatenation."""
    if starts is None or codes is None:
        return torch.zeros(0, dtype=torch.long)
    return torch.diff(starts, append=torch.tensor([codes.shape[1]])) if len(starts) else starts


def _columns(starts: Tensor, lengths: Tensor) -> Tensor:
    """The places of all clips' columns, one clip after the other."""
    before = lengths.cumsum(0) - lengths
    return (starts - before).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


@dataclass
class Voices:
    """Who is heard and then speaks in a packed batch: the reference and the trained audio of one speaker in one sample, a pair.

    Audio is an input clip or a clip without targets (the reference), or one with targets. A clip whose speaker is not known, and
    a speaker who has only one kind in the sample, are left out.

    speakers        of each pair
    heard, spoken   [columns] int64, sorted positions of all references and of all trained audio, pair after pair
    heard_lengths, spoken_lengths      columns of each pair
    """

    speakers: list[str]
    heard: Tensor
    spoken: Tensor
    heard_lengths: list[int]
    spoken_lengths: list[int]

    @classmethod
    def of(
        cls,
        batch: ExtendedHiggsAudioBatchInput,
        num_text: int,
        speakers: Sequence[Sequence[str | None]],
        audio_in_token: int,
        audio_out_token: int,
    ) -> Voices:
        """speakers: of each sample's clips, in the order of their placeholders; clips beyond them have none"""
        in_lengths = _clip_lengths(batch.audio_in_ids_start, batch.audio_in_ids).tolist()
        out_lengths = _clip_lengths(batch.audio_out_ids_start, batch.audio_out_ids).tolist()
        places = (num_text + torch.arange(sum(in_lengths) + sum(out_lengths))).split(in_lengths + out_lengths)
        is_target = (batch.label_audio_ids != IGNORE_INDEX).any(0).split(out_lengths)
        clips = {
            audio_in_token: iter([(place, False) for place in places[: len(in_lengths)]]),
            audio_out_token: iter([(p, bool(t.any())) for p, t in zip(places[len(in_lengths) :], is_target)]),
        }
        heard: dict[tuple[int, str], list[Tensor]] = {}
        spoken: dict[tuple[int, str], list[Tensor]] = {}
        for row, (ids, names) in enumerate(zip(batch.input_ids.tolist(), speakers)):
            placeholders = (token for token in ids if token in clips)
            for token, name in zip(placeholders, itertools.chain(names, itertools.repeat(None))):
                place, is_trained = next(clips[token])
                if name is not None:
                    (spoken if is_trained else heard).setdefault((row, name), []).append(place)
        pairs = [voice for voice in spoken if voice in heard]
        before, after = ([torch.cat(places[voice]) for voice in pairs] for places in (heard, spoken))
        nothing = torch.zeros(0, dtype=torch.long)
        return cls(
            [name for _, name in pairs],
            torch.cat([nothing, *before]),
            torch.cat([nothing, *after]),
            [len(place) for place in before],
            [len(place) for place in after],
        )


@dataclass
class ExtendedHiggsAudioBatchInput(HiggsAudioBatchInput):
    """A batch of the official collator, with its size, its targets and where its samples came from.

    input_ids, attention_mask, label_ids      [B, s] int64
    audio_out_ids, label_audio_ids            [K, N_out] int64, delayed, with stream ids
    audio_out_ids_start                       [num_audio_out] int64; ..._group_loc: the row of each clip
    audio_in_ids                              [K, N_in] int64;  audio_in_ids_start  [num_audio_in] int64
    audio_features                            [num_audio_in, mel_bins, mel_frames] float32, with Whisper only
    audio_feature_attention_mask              [num_audio_in, mel_frames] int32, with Whisper only
    """

    sources: list[str] = field(default_factory=list)  # where each row came from, for error messages
    unreadable: list[str] = field(default_factory=list)  # what is wrong with samples that should be here and are not
    clamped: dict[str, int] = field(default_factory=dict)  # clamped audio indices by source
    has_label_overrides: bool = False  # some labels came from `audio_label_ids_concat`, not from the inputs
    packing: Packing | None = None  # the same batch as one sequence; None where the audio comes through Whisper
    voices: Voices | None = None  # for the voice-consistency loss; None where nobody asked

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ExtendedHiggsAudioBatchInput:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ExtendedHiggsAudioBatchInput:
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> ExtendedHiggsAudioBatchInput:
        changed = _mapped(self, function)
        for name in ("packing", "voices"):
            if (part := getattr(self, name)) is not None:
                changed[name] = dataclasses.replace(part, **_mapped(part, function))
        return dataclasses.replace(self, **changed)

    def model_inputs(self) -> dict:
        """The keyword arguments of `HiggsAudioModel.forward`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(HiggsAudioBatchInput) if f.name != "reward"}

    def num_frames(self) -> int:
        """Audio frames, heard and spoken, without stream ids and delay columns."""
        K = self.audio_out_ids.shape[0]
        pairs = ((self.audio_in_ids, self.audio_in_ids_start), (self.audio_out_ids, self.audio_out_ids_start))
        return sum(ids.shape[1] - len(starts) * (K + 1) for ids, starts in pairs if ids is not None)

    def num_targets(self) -> tuple[Tensor, Tensor]:
        """How many next-token targets the labels hold: text [] and audio [K], int64.

        Labels are input-aligned, so the first position is nobody's successor and never counts.
        """
        text = (self.label_ids[:, 1:] != IGNORE_INDEX).sum()
        K = self.audio_out_ids.shape[0]
        if self.label_audio_ids.numel() == 0:
            return text, text.new_zeros(K)
        return text, (self.label_audio_ids[:, 1:] != IGNORE_INDEX).sum(dim=1)


class ExtendedHiggsAudioSampleCollator(HiggsAudioSampleCollator):
    """Collates `ChatMLDatasetSample`s; see the module's docstring for what differs from the official collator.

    feature_extractor: computes the audio tower's input; None when Whisper is off.
    feature_shape:     (mel_bins, mel_frames) of the model's audio tower, which wants (perhaps empty) features in every
                       batch; None for a model without one.
    strict:            more placeholders than clips is an error instead of a clamped index.
    pack:              attention works on one sequence without padding, else on padded rows. Neither where audio comes
                       through Whisper or is not heard at all: such a batch has no `Packing`.
    with_voices:       batches know their `Voices`, from the samples' `speakers`.
    Other arguments are the official collator's.
    """

    def __init__(
        self,
        *,
        feature_extractor: WhisperFeatureExtractor | None = None,
        feature_shape: tuple[int, int] | None = None,
        strict: bool = False,
        pack: bool = True,
        with_voices: bool = False,
        **kwargs,
    ):
        super().__init__(whisper_processor=None, encode_whisper_embed=False, **kwargs)
        self.has_packing = feature_shape is None and self.return_audio_in_tokens
        self.pack = pack and self.has_packing
        self.feature_extractor = feature_extractor
        self.feature_shape = feature_shape
        self.strict = strict
        self.with_voices = with_voices

    def __call__(self, batch: Sequence[ChatMLDatasetSample]) -> ExtendedHiggsAudioBatchInput:
        if not batch:
            raise CollateError("cannot collate an empty batch")
        sources = [getattr(sample, "source", "") or f"sample {i}" for i, sample in enumerate(batch)]
        clamped: dict[str, int] = {}
        repaired = []
        for sample, source in zip(batch, sources):
            sample, num_clamped = self._clamp(self._copy(sample), source)
            if num_clamped:
                clamped[source] = num_clamped
                warnings.warn(f"{source}: {num_clamped} audio index(es) clamped to the last clip, not trained on", stacklevel=2)
            repaired.append(self._cut_long_audio(sample) if self.feature_extractor else sample)
        if len({sample.label_ids is None for sample in repaired}) > 1:
            raise CollateError("a batch mixes samples with and without labels")

        # The official collator changes its samples' labels, and which audio turns train has to be known afterwards.
        official = super().__call__([dataclasses.replace(s, label_ids=_clone(s.label_ids)) for s in repaired])
        result = ExtendedHiggsAudioBatchInput(**vars(official), sources=sources, clamped=clamped)
        rows = [row for row, s in enumerate(repaired) for _ in range(int((s.input_ids == self.audio_out_token_id).sum()))]
        result.audio_out_ids_start_group_loc = torch.tensor(rows, dtype=torch.long)
        if result.audio_out_ids.shape[-1] == 0:
            result.audio_out_ids = torch.zeros((self.audio_num_codebooks or 0, 0), dtype=torch.long)
            if result.label_audio_ids is not None:
                result.label_audio_ids = result.audio_out_ids.clone()
        if result.label_audio_ids is not None and not self.disable_audio_codes_transform:
            self._override_labels(result, repaired)
        self._add_features(result, repaired)
        if self.has_packing:
            packing = Packing.of(result, self.audio_in_token_id, self.audio_out_token_id)
            result.packing = packing if self.pack else packing.with_rows(self.round_to)
        if self.with_voices:
            speakers = [getattr(sample, "speakers", ()) for sample in batch]
            result.voices = Voices.of(
                result, result.packing.num_text, speakers, self.audio_in_token_id, self.audio_out_token_id
            )
        return result

    def num_positions(self, num_ids: int, clips: Sequence[tuple[int, bool]]) -> int:
        """Positions of a sample after expansion, from the number of its ids and its clips' (frames, whether audio-out).

        raises: CollateError with Whisper, whose features depend on the waveforms
        """
        if self.feature_extractor:
            raise CollateError("a checkpoint with Whisper: lengths are not known beforehand; use --batch_size")
        extra = 1 + self.audio_num_codebooks if self.use_delay_pattern else 2  # stream ids and delay
        return num_ids + sum(frames + extra - 1 for frames, is_out in clips if is_out or self.return_audio_in_tokens)

    def _copy(self, sample: ChatMLDatasetSample) -> ChatMLDatasetSample:
        """A copy on the CPU in which absent audio is an empty tensor."""
        K = self.audio_num_codebooks or 0
        empty = {
            "audio_ids_concat": torch.zeros((K, 0), dtype=torch.long),
            "audio_ids_start": torch.zeros(0, dtype=torch.long),
            "audio_waveforms_concat": torch.zeros(0),
            "audio_waveforms_start": torch.zeros(0, dtype=torch.long),
            "audio_sample_rate": torch.zeros(0),
            "audio_speaker_indices": torch.zeros(0, dtype=torch.long),
        }
        values = {f.name: getattr(sample, f.name) for f in dataclasses.fields(ChatMLDatasetSample)}
        values = {n: v.detach().cpu() if isinstance(v, Tensor) else v for n, v in values.items()}
        values |= {n: default for n, default in empty.items() if values[n] is None or values[n].numel() == 0}
        return ChatMLDatasetSample(**values)

    def _placeholders(self, sample: ChatMLDatasetSample) -> Tensor:
        """Positions of `<|AUDIO|>` and `<|AUDIO_OUT|>` in the sample, in order."""
        ids = sample.input_ids
        return ((ids == self.audio_in_token_id) | (ids == self.audio_out_token_id)).nonzero().squeeze(1)

    def _clamp(self, sample: ChatMLDatasetSample, source: str) -> tuple[ChatMLDatasetSample, int]:
        """Serve every placeholder: those beyond the clips repeat the last clip and lose their labels."""
        positions = self._placeholders(sample)
        is_out = sample.input_ids[positions] == self.audio_out_token_id
        # Codes stand in the order of all placeholders (a checkpoint that reads no audio-in tokens may lack those after
        # the last audio-out), waveforms in the order of the audio-in placeholders alone.
        needs_codes = is_out | torch.tensor(self.return_audio_in_tokens)
        num_needed = int(needs_codes.nonzero().max()) + 1 if needs_codes.any() else 0
        num_clips = len(sample.audio_ids_start)
        num_waveforms_needed = int((~is_out).sum()) if self.feature_extractor else 0
        num_waveforms = len(sample.audio_waveforms_start)
        extra, extra_waveforms = max(0, num_needed - num_clips), max(0, num_waveforms_needed - num_waveforms)
        for what, missing, given in (("clip", extra, num_clips), ("waveform", extra_waveforms, num_waveforms)):
            if missing and (self.strict or given == 0):
                raise CollateError(
                    f"{source}: {given + missing} audio placeholders but {given} {what}(s). Give each <|AUDIO|> and "
                    "<|AUDIO_OUT|> its audio (a wav file where Whisper is on), and check that no text contains these "
                    "tokens literally"
                )
        changes = {}
        if extra:
            last = sample.get_audio_codes(num_clips - 1)
            ends = sample.audio_ids_concat.shape[1] + last.shape[1] * torch.arange(extra)
            changes["audio_ids_concat"] = torch.cat([sample.audio_ids_concat, *[last] * extra], dim=1)
            changes["audio_ids_start"] = torch.cat([sample.audio_ids_start, ends])
            if sample.label_ids is not None:
                changes["label_ids"] = sample.label_ids.clone()
                changes["label_ids"][positions[num_clips:num_needed]] = IGNORE_INDEX
            if sample.audio_label_ids_concat is not None:
                labels = [sample.audio_label_ids_concat, *[sample.get_audio_codes_labels(num_clips - 1)] * extra]
                changes["audio_label_ids_concat"] = torch.cat(labels, dim=1)
        if extra_waveforms:
            last, rate = sample.get_wv(num_waveforms - 1)
            ends = len(sample.audio_waveforms_concat) + len(last) * torch.arange(extra_waveforms)
            changes["audio_waveforms_concat"] = torch.cat([sample.audio_waveforms_concat, *[last] * extra_waveforms])
            changes["audio_waveforms_start"] = torch.cat([sample.audio_waveforms_start, ends])
            changes["audio_sample_rate"] = torch.cat([sample.audio_sample_rate, rate.expand(extra_waveforms)])
        return dataclasses.replace(sample, **changes), max(extra, extra_waveforms)

    def _cut_long_audio(self, sample: ChatMLDatasetSample) -> ChatMLDatasetSample:
        """Give each chunk of a long audio-in clip its own `<|audio_bos|><|AUDIO|><|audio_eos|>`, codes and waveform.

        Waveforms are resampled to the feature extractor's rate. Codes are cut in proportion to the waveform.
        """
        rate = self.feature_extractor.sampling_rate
        chunk = self.feature_extractor.n_samples
        inputs, labels, waveforms, codes, code_labels = [], [], [], [], []
        done, index_in = 0, 0
        has_codes = len(sample.audio_ids_start) > 0
        for index, position in enumerate(self._placeholders(sample).tolist()):
            clip = sample.get_audio_codes(index) if has_codes and index < len(sample.audio_ids_start) else None
            clip_labels = sample.get_audio_codes_labels(index) if clip is not None else None
            if sample.input_ids[position] == self.audio_out_token_id:
                codes.append(clip)
                code_labels.append(clip_labels)
                continue
            waveform, source_rate = sample.get_wv(index_in)
            index_in += 1
            if int(source_rate) != rate:
                resampled = librosa.resample(waveform.numpy(), orig_sr=int(source_rate), target_sr=rate)
                waveform = torch.from_numpy(resampled)
            num_chunks = max(1, math.ceil(len(waveform) / chunk))
            inputs += [sample.input_ids[done : position - 1]] + [sample.input_ids[position - 1 : position + 2]] * num_chunks
            if sample.label_ids is not None:
                labels += [sample.label_ids[done : position - 1]]
                labels += [sample.label_ids[position - 1 : position + 2]] * num_chunks
            done = position + 2
            waveforms += [waveform[i * chunk : (i + 1) * chunk] for i in range(num_chunks)]
            for source, target in ((clip, codes), (clip_labels, code_labels)):
                target += [None] * num_chunks if source is None else _cut_codes(source, num_chunks, chunk, len(waveform))
        inputs.append(sample.input_ids[done:])
        kept = [c for c in codes if c is not None]
        kept_labels = [c for c in code_labels if c is not None]
        return dataclasses.replace(
            sample,
            input_ids=torch.cat(inputs),
            label_ids=None if sample.label_ids is None else torch.cat([*labels, sample.label_ids[done:]]),
            audio_ids_concat=torch.cat(kept, dim=1) if kept else sample.audio_ids_concat,
            audio_ids_start=starts(kept),
            audio_label_ids_concat=torch.cat(kept_labels, dim=1) if kept_labels else None,
            audio_waveforms_concat=torch.cat(waveforms) if waveforms else sample.audio_waveforms_concat,
            audio_waveforms_start=starts(waveforms),
            audio_sample_rate=torch.full((len(waveforms),), float(rate)),
        )

    def _override_labels(self, batch: ExtendedHiggsAudioBatchInput, samples: list[ChatMLDatasetSample]) -> None:
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
        labels = torch.nn.functional.pad(codes, (1, 0), value=IGNORE_INDEX)
        labels = torch.nn.functional.pad(labels, (0, 1), value=self.audio_stream_eos_id)
        if not self.use_delay_pattern:
            return labels
        return build_delay_pattern_mask(labels[None], bos_token_id=IGNORE_INDEX, pad_token_id=IGNORE_INDEX)[0][0]

    def _add_features(self, batch: ExtendedHiggsAudioBatchInput, samples: list[ChatMLDatasetSample]) -> None:
        """Whisper features of every audio-in chunk, in the order of the `<|AUDIO|>` placeholders."""
        extractor = self.feature_extractor
        if self.feature_shape is None:
            return
        waveforms = [s.get_wv(i)[0].numpy() for s in samples for i in range(len(s.audio_waveforms_start))] if extractor else []
        if waveforms:
            features = extractor(
                waveforms,
                sampling_rate=extractor.sampling_rate,
                return_attention_mask=True,
                padding="max_length",
                return_tensors="pt",
            )
            batch.audio_features = features["input_features"]
            batch.audio_feature_attention_mask = features["attention_mask"]
        else:
            # An empty tensor, not None: the audio tower takes part in every step on every rank.
            bins, frames = self.feature_shape
            batch.audio_features = torch.zeros((0, bins, frames))
            batch.audio_feature_attention_mask = torch.zeros((0, frames), dtype=torch.int32)


def _mapped(holder: Any, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Its tensors, after `function`."""
    return {name: function(value) for name, value in vars(holder).items() if isinstance(value, Tensor)}


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def starts(pieces: list[Tensor]) -> Tensor:
    """Where each piece begins in their concatenation along the last dimension, int64."""
    lengths = torch.tensor([0] + [piece.shape[-1] for piece in pieces], dtype=torch.long)
    return lengths.cumsum(0)[:-1]


def _cut_codes(codes: Tensor, num_chunks: int, chunk_samples: int, total_samples: int) -> list[Tensor]:
    """Cut codes [K, T] where the waveform of `total_samples` was cut; every frame is in exactly one piece."""
    T = codes.shape[1]
    cuts = [min(T, round(T * i * chunk_samples / total_samples)) for i in range(num_chunks)] + [T]
    return [codes[:, a:b] for a, b in pairwise(cuts)]


def create_collator(
    config: HiggsAudioConfig,
    *,
    use_delay_pattern: bool | None = None,
    audio_num_codebooks: int | None = None,
    return_audio_in_tokens: bool | None = None,
    encode_whisper_embed: bool | None = None,
    strict: bool = False,
    pack: bool = True,
    with_voices: bool = False,
    round_to: int = 8,
) -> ExtendedHiggsAudioSampleCollator:
    """The collator a checkpoint was made for; None follows the checkpoint's config, anything else overrides it.

    raises: CollateError for an override the checkpoint cannot serve.
    """

    def choose(value, default):
        return default if value is None else value

    has_tower = not config.skip_audio_tower
    whisper = choose(encode_whisper_embed, config.encode_whisper_embed and has_tower)
    num_codebooks = choose(audio_num_codebooks, config.audio_num_codebooks)
    in_tokens = choose(return_audio_in_tokens, config.encode_audio_in_tokens)
    if whisper and not has_tower:
        raise CollateError("encode_whisper_embed=True needs an audio tower, but this checkpoint has skip_audio_tower=true")
    if in_tokens and not config.encode_audio_in_tokens:
        raise CollateError("return_audio_in_tokens=True, but this checkpoint has encode_audio_in_tokens=false and ignores them")
    if num_codebooks != config.audio_num_codebooks:
        raise CollateError(
            f"audio_num_codebooks={num_codebooks}, but this checkpoint embeds and predicts {config.audio_num_codebooks}"
        )
    if with_voices and (has_tower or not in_tokens):
        raise CollateError(
            "the voice-consistency loss compares hidden states of reference codes, which this checkpoint does not read "
            "(skip_audio_tower=false or encode_audio_in_tokens=false); leave out --consistency_loss_weight"
        )
    extractor = _feature_extractor(config) if has_tower else None
    return ExtendedHiggsAudioSampleCollator(
        feature_extractor=extractor if whisper else None,
        feature_shape=(extractor.feature_size, extractor.nb_max_frames) if has_tower else None,
        strict=strict,
        pack=pack,
        with_voices=with_voices,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        pad_token_id=config.pad_token_id,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        audio_num_codebooks=num_codebooks,
        return_audio_in_tokens=in_tokens,
        use_delay_pattern=choose(use_delay_pattern, config.use_delay_pattern),
        round_to=round_to,
    )


def _feature_extractor(config: HiggsAudioConfig) -> WhisperFeatureExtractor:
    """The extractor the tower was built for: whisper-large-v3's settings, the window from `max_source_positions`.

    The tower halves the mel frames once before its positions, so a window has 2 * max_source_positions frames of 10 ms.
    """
    encoder = config.audio_encoder_config
    chunk_sec = 2 * encoder.max_source_positions * 160 / 16000
    if chunk_sec != int(chunk_sec):
        raise CollateError(f"max_source_positions={encoder.max_source_positions} is not a whole number of seconds")
    return WhisperFeatureExtractor(feature_size=encoder.num_mel_bins, chunk_length=int(chunk_sec))


def main() -> None:
    """A text of three tokens and a clip of four frames: what goes in, what is predicted, what is fed."""
    config = HiggsAudioConfig(skip_audio_tower=True, encode_audio_in_tokens=True, use_delay_pattern=True)
    text, clip = [11, 12, 13], config.audio_out_token_idx
    empty = torch.zeros(0, dtype=torch.long)
    sample = ChatMLDatasetSample(
        input_ids=torch.tensor([*text, clip, 14]),
        label_ids=torch.tensor([IGNORE_INDEX] * len(text) + [clip, 14]),
        audio_ids_concat=torch.arange(4).expand(config.audio_num_codebooks, 4),
        audio_ids_start=torch.tensor([0]),
        audio_waveforms_concat=torch.zeros(0),
        audio_waveforms_start=empty,
        audio_sample_rate=torch.zeros(0),
        audio_speaker_indices=empty,
    )
    batch = create_collator(config)([sample])
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            print(f"{name:30} {tuple(value.shape)} {value.dtype}")
    text_targets, audio_targets = batch.num_targets()
    print(f"\ntext targets {text_targets.item()}, audio targets per codebook {audio_targets.tolist()}")
    print(f"fed, a row per codebook:\n{batch.audio_out_ids}\nlabels:\n{batch.label_audio_ids}")


if __name__ == "__main__":
    main()
