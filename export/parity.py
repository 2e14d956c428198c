"""How merging changes what a model predicts, on real records: `bash launch.sh merge ADAPTER BASE OUT --manifest val.jsonl`.

The reference is the adapter beside its base in float32, computed by PEFT. Compared with it: the base alone, which shows how
large the adapter's effect is; the merged weights in float32; and, in bfloat16, the adapter unmerged and merged. Merging is
sound where its rows are far below the first. An adapter that was trained on an NF4 base is compared on that base as well: what
the merged model loses beside what was trained. Two float32 copies of the model are never in memory at once.

Legend: P supervised text positions, N supervised audio positions, K codebooks, V text vocabulary, C audio vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from torch import Tensor

import collate
import data
from common import DataError
from export.merge import merged
from export.read import Adapter, Full
from generate.models import insert_adapter, load_full
from generate.official import as_prompt, generate_one
from loss import IGNORE_INDEX
from prepare.audio import AudioStore, load_codec
from prepare.forms import open_manifest
from prepare.manifest import Record


@dataclass
class Predictions:
    text: Tensor  # [P, V] float32 logits
    audio: Tensor  # [N * K, C] float32 logits
    codes: list[Tensor]  # one [K, T] per prompt, greedy


@dataclass
class Row:
    """One model against the reference."""

    name: str
    largest: float  # |difference of logits|
    mean: float
    same_text: float  # share of positions with the same most likely token
    same_audio: float
    same_codes: float  # share of greedily generated codes

    @classmethod
    def of(cls, name: str, mine: Predictions, reference: Predictions) -> Row:
        pairs = [(mine.text, reference.text), (mine.audio, reference.audio)]
        apart = torch.cat([(a - b).abs().flatten() for a, b in pairs])
        same = [_share(a.argmax(-1) == b.argmax(-1)) for a, b in pairs]
        codes = [_share(_overlap(a, b)) for a, b in zip(mine.codes, reference.codes)]
        return cls(name, apart.max().item(), apart.mean().item(), *same, sum(codes) / max(1, len(codes)))

    def __str__(self) -> str:
        shares = "".join(f"{share:12.1%}" for share in (self.same_text, self.same_audio, self.same_codes))
        return f"{self.name:24}{self.largest:12.2e}{self.mean:12.2e}{shares}"


@dataclass
class Report:
    rows: list[Row]
    num_records: int
    num_prompts: int

    def __str__(self) -> str:
        title = f"against the adapter in float32, on {self.num_records} records ({self.num_prompts} prompts):"
        columns = ("largest", "mean", "same text", "same audio", "same codes")
        return "\n".join([title, " " * 24 + "".join(f"{column:>12}" for column in columns), *map(str, self.rows)])


def compare(
    adapter: Adapter, base: Full, manifest: Path, num_records: int, audio_tokenizer: str, quantized: bool = False
) -> Report:
    """The report on the manifest's first records; DataError if they cannot be read."""
    config = base.config
    store = AudioStore.of(config, manifest.parent / "codes", audio_tokenizer)
    records = list(itertools.islice(open_manifest(manifest)[0], num_records))
    clips = store.missing(records)
    for problem in store.encode(lambda: load_codec(audio_tokenizer, "cpu"), clips) if clips else ():
        if problem:
            raise DataError(problem)
    dataset = data.ChatMLDataset(records, base.tokenizer, store)
    collator = collate.create_collator(config)
    batches = [collator([dataset[index]]) for index in range(len(records))]
    prompts = [prompt for record in records if (prompt := _prompt(record, base, store))]

    def predict(model: HiggsAudioModel) -> Predictions:
        return _predict(model, base.tokenizer, batches, prompts)

    model = load_full(base, torch.float32)
    alone = predict(model)
    insert_adapter(adapter, model)
    reference = predict(model)
    unmerged = predict(_to_bf16(model))
    del model
    model = load_full(base, torch.float32, named=merged(adapter, base))
    rows = [
        Row.of("base alone", alone, reference),
        Row.of("merged, float32", predict(model), reference),
        Row.of("adapter, bfloat16", unmerged, reference),
        Row.of("merged, bfloat16", predict(_to_bf16(model)), reference),
    ]
    if quantized:
        del model
        model = load_full(base, torch.float32, quantize=True)
        insert_adapter(adapter, model)
        rows.append(Row.of("adapter, NF4 base", predict(model), reference))
    return Report(rows, len(records), len(prompts))


def _to_bf16(model: HiggsAudioModel) -> HiggsAudioModel:
    """The weights in bfloat16; rotary frequencies stay in float32, as when the model is loaded in bfloat16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def _prompt(record: Record, base: Full, store: AudioStore):
    """The record up to its last turn, and the most frames to generate; None if that turn has no audio."""
    *_, last = record.chatml.messages
    if last.role != "assistant" or not record.audio or not record.audio[-1].is_output:
        return None
    num_frames = store.num_frames(record.audio[-1], record.source)
    before = record.cropped(len(record.chatml.messages) - 1)
    sample = data.ChatMLDataset([before], base.tokenizer, store)[0]
    return as_prompt(sample, base.tokenizer, force_audio=True), 2 * num_frames + 20


@torch.no_grad()
def _predict(model: HiggsAudioModel, tokenizer, batches: list, prompts: list) -> Predictions:
    text, audio = [], []
    for batch in batches:
        output = model(**batch.model_inputs())
        text.append(output.logits[:, :-1][output.expanded_labels[:, 1:] != IGNORE_INDEX].float())
        audio.append(output.audio_logits[:-1][batch.label_audio_ids.T[1:] != IGNORE_INDEX].float())
    answers = [generate_one(model, tokenizer, prompt, longest) for prompt, longest in prompts]
    return Predictions(torch.cat(text), torch.cat(audio), [answer.codes[0] for answer in answers])


def _overlap(mine: Tensor, theirs: Tensor) -> Tensor:
    """[K, longer T] bool: where two clips are equal; False beyond the end of the shorter one."""
    T = min(mine.shape[1], theirs.shape[1])
    equal = torch.zeros(mine.shape[0], max(mine.shape[1], theirs.shape[1]), dtype=torch.bool)
    equal[:, :T] = mine[:, :T] == theirs[:, :T]
    return equal


def _share(equal: Tensor) -> float:
    """The share of True; 1 where there is nothing to compare."""
    return equal.float().mean().item() if equal.numel() else 1.0
