"""Does a transcript fit its clip? By the audio loss of a trained model, or by the words that speech recognition finds.

A model that has learnt to speak predicts a clip better from its own text than from the texts of other clips. So each clip's
loss under its own text is ranked among its losses under other texts of about the same length.

Legend: B texts of one clip, K codebooks, N audio positions.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from collate import Batch, ExtendedHiggsAudioSampleCollator, create_collator
from common import DataError
from data import ChatMLDataset
from generate.judges import Transcriber
from generate.models import load_model
from generate.scores import word_errors
from loss import IGNORE_INDEX, LabelSpec, dense_targets, score_logits
from prepare.audio import AudioStore, read_waveform
from prepare.manifest import Manifest, Record
from prepare.overlap import transcripts
from process.gpu import on_gpu

NUM_OTHERS = 15  # texts of other clips that each clip is tried with
LEAST_SHARE = 0.45  # of the usual margin, by which the own text has to be better than others are on average
LEAST_USUAL = 2.0  # standard deviations: the usual margin of a model that can judge
MAX_POSITIONS = 16_384  # of a micro-batch
MAX_WORD_ERRORS = 0.5  # share of the text's words


def suspects(records: Manifest, args: argparse.Namespace) -> list[tuple[Record, str]]:
    """(record, what was found) of each clip whose text is probably another's, the worst first. args: of `prepare check`"""
    device = torch.device("cuda" if on_gpu(args.device) else "cpu")
    if args.asr_model:
        return misheard_texts(records, Transcriber(args.asr_model, device))
    model, tokenizer = load_model(args.base_ckpt, "", args.base_revision or None, None, device)
    dataset = ChatMLDataset(records, tokenizer, AudioStore.of(model.config, args.codes_dir, args.audio_tokenizer))
    return unlikely_texts(dataset, model, create_collator(model.config))


def unlikely_texts(dataset: ChatMLDataset, model: Any, collator: ExtendedHiggsAudioSampleCollator) -> list[tuple[Record, str]]:
    """(record, what was found) of each clip that another text fits about as well as its own, the worst first.

    Records that are not one clip with its text, perhaps after a reference, are left out.

    raises: DataError for a model that cannot tell
    """
    clips = [(record, texts[-1]) for record in dataset.records if record.audio and (texts := transcripts(record))]
    others = neighbours([text for _, text in clips])
    found = []  # (margin in standard deviations, record, what)
    for (record, text), different in tqdm(zip(clips, others), total=len(clips), desc="transcripts", unit="clip"):
        own, *losses = losses_under(record, [text, *different], dataset, model, collator)
        rank = 1 + sum(loss < own for loss in losses)
        what = f"its text is number {rank} of {len(losses) + 1} by audio loss: {own:.2f} nats, others {np.mean(losses):.2f}"
        found.append(((np.mean(losses) - own) / (np.std(losses) + 1e-6), record, what))
    usual = np.median([margin for margin, *_ in found]) if found else 0.0
    if usual < LEAST_USUAL:
        problem = "clips fit other texts about as well as their own"
        raise DataError(f"--transcripts: {problem}: the model has not learnt to speak, or most texts are wrong")
    found.sort(key=lambda item: item[0])
    return [(record, what) for margin, record, what in found if margin < LEAST_SHARE * usual]


def neighbours(texts: Sequence[str]) -> Iterator[list[str]]:
    """For each text up to NUM_OTHERS different ones, the nearest by their length."""
    different = sorted(set(texts), key=lambda text: (len(text), text))
    place = {text: number for number, text in enumerate(different)}
    for text in texts:
        first = max(0, min(place[text] - NUM_OTHERS // 2, len(different) - NUM_OTHERS - 1))
        yield [other for other in different[first : first + NUM_OTHERS + 1] if other != text]


@torch.no_grad()
def losses_under(
    record: Record, texts: Sequence[str], dataset: ChatMLDataset, model: Any, collator: ExtendedHiggsAudioSampleCollator
) -> list[float]:
    """The audio loss of a record's last clip, in nats per code, under each text in the place of its own."""
    *before, user, answer = record.chatml.messages
    asked = [dataclasses.replace(user, content=text) for text in texts]
    chats = [dataclasses.replace(record.chatml, messages=[*before, turn, answer]) for turn in asked]
    samples = [dataset.sample(dataclasses.replace(record, chatml=chat)) for chat in chats]
    size = max(1, MAX_POSITIONS // (len(samples[0].input_ids) + samples[0].audio_ids_concat.shape[1]))
    losses, spec = [], LabelSpec.of(model.config)
    for first in range(0, len(samples), size):
        batch = collator(samples[first : first + size]).to(model.device)
        output = model(**batch.model_inputs())
        _, audio = dense_targets(output, batch, spec)
        nats = score_logits(output.audio_logits, audio.labels, audio.inputs).nats
        losses += means_by_row(nats, audio.labels != IGNORE_INDEX, batch)
    return losses


def means_by_row(nats: Tensor, is_target: Tensor, batch: Batch) -> list[float]:
    """nats, is_target: [N, K]; returns [B]"""
    lengths = torch.diff(batch.audio_out_ids_start, append=batch.audio_out_ids_start.new_tensor([len(nats)]))
    rows = batch.audio_out_ids_start_group_loc.repeat_interleave(lengths)
    sums = [
        torch.zeros(len(batch.input_ids), device=nats.device).index_add(0, rows, x.float().sum(1)) for x in (nats, is_target)
    ]
    return (sums[0] / sums[1]).tolist()


def misheard_texts(records: Iterable[Record], transcribe: Any) -> list[tuple[Record, str]]:
    """(record, what was found) of each clip in which speech recognition finds other words, the worst first."""
    found = []
    for record in tqdm(records, desc="transcripts", unit="clip"):
        texts = transcripts(record)
        if not texts or not record.audio or record.audio[-1].holds_codes:
            continue
        heard = transcribe(*read_waveform(record.audio[-1], record.source))
        errors, count = word_errors(heard, texts[-1])
        if errors > MAX_WORD_ERRORS * count:
            found.append((errors / max(1, count), record, f"{errors} errors in {count} words; recognised is: {heard}"))
    return [(record, what) for _, record, what in sorted(found, key=lambda item: -item[0])]
