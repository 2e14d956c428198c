"""How far merging changes what an adapter says: logits and greedy codes on real records.

    python checkpoint.py merge ADAPTER BASE OUT --manifest val.jsonl [--records 4]

The reference is the adapter beside its base in float32, computed by PEFT. Compared with it: the base alone, which shows how
large the adapter's effect is; the merged weights in float32; and, in bfloat16, the adapter unmerged and merged. Merging is
sound where its rows are far below the first. Two float32 copies of the model are never in memory at once.

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
from prepare.audio import AudioStore, codec_frame_rate_hz, load_codec
from prepare.forms import open_manifest
from prepare.manifest import Record


@dataclass
class Said:
    """What a model makes of the records."""

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
    def of(cls, name: str, said: Said, reference: Said) -> Row:
        pairs = [(said.text, reference.text), (said.audio, reference.audio)]
        apart = torch.cat([(mine - theirs).abs().flatten() for mine, theirs in pairs])
        same = [_share(mine.argmax(-1) == theirs.argmax(-1)) for mine, theirs in pairs]
        codes = [_share(_overlap(mine, theirs)) for mine, theirs in zip(said.codes, reference.codes)]
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
        lines = [f"against the adapter in float32, on {self.num_records} records ({self.num_prompts} prompts):"]
        lines += [f"{'':24}{'largest':>12}{'mean':>12}{'same text':>12}{'same audio':>12}{'same codes':>12}"]
        return "\n".join([*lines, *map(str, self.rows)])


def compare(adapter: Adapter, base: Full, manifest: Path, num_records: int, audio_tokenizer: str) -> Report:
    """The report for the manifest's first records; DataError if they cannot be read."""
    records = list(itertools.islice(open_manifest(manifest)[0], num_records))
    config = base.config
    store = AudioStore(
        config.audio_num_codebooks,
        config.audio_codebook_size,
        codec_frame_rate_hz(audio_tokenizer),
        cache_dir=manifest.parent / "codes",
        codec=audio_tokenizer,
    )
    clips = store.missing(records)
    problems = list(filter(None, store.encode(lambda: load_codec(audio_tokenizer, "cpu"), clips))) if clips else []
    if problems:
        raise DataError(problems[0])
    batches = _batches(records, base, store)
    prompts = [prompt for record in records if (prompt := _prompt(record, base, store))]

    def say(model: HiggsAudioModel) -> Said:
        return _say(model, base.tokenizer, batches, prompts)

    model = load_full(base, ((name, base.read(name)) for name in base.shapes), torch.float32)
    alone = say(model)
    insert_adapter(adapter, model)
    reference = say(model)
    rows = [Row.of("base alone", alone, reference)]
    unmerged = say(_to_bf16(model))
    del model
    model = load_full(base, merged(adapter, base), torch.float32)
    rows.append(Row.of("merged, float32", say(model), reference))
    rows.append(Row.of("adapter, bfloat16", unmerged, reference))
    rows.append(Row.of("merged, bfloat16", say(_to_bf16(model)), reference))
    return Report(rows, len(records), len(prompts))


def _to_bf16(model: HiggsAudioModel) -> HiggsAudioModel:
    """The weights in bfloat16; rotary frequencies stay in float32, as when the model is loaded in bfloat16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def _batches(records: list[Record], base: Full, store: AudioStore) -> list[collate.ExtendedHiggsAudioBatchInput]:
    collator = collate.create_collator(base.config, strict=True)
    dataset = data.ChatMLDataset(records, base.tokenizer, store)
    return [collator([dataset[index]]) for index in range(len(records))]


def _prompt(record: Record, base: Full, store: AudioStore):
    """The record up to its last turn and the longest answer to wait for; None if the last turn is not speech."""
    *_, last = record.chatml.messages
    if last.role != "assistant" or not record.audio or not record.audio[-1].is_output:
        return None
    num_frames = store.num_frames(record.audio[-1], record.source)
    before = record.cropped(len(record.chatml.messages) - 1)
    sample = data.ChatMLDataset([before], base.tokenizer, store)[0]
    return as_prompt(sample, base.tokenizer, force_audio=True), 2 * num_frames + 20


@torch.no_grad()
def _say(model: HiggsAudioModel, tokenizer, batches: list, prompts: list) -> Said:
    text, audio = [], []
    for batch in batches:
        output = model(**batch.model_inputs())
        supervised = output.expanded_labels[:, 1:] != IGNORE_INDEX
        text.append(output.logits[:, :-1][supervised].float())
        supervised = batch.label_audio_ids.T[1:] != IGNORE_INDEX
        audio.append(output.audio_logits[:-1][supervised].float())
    said = [generate_one(model, tokenizer, prompt, longest) for prompt, longest in prompts]
    return Said(torch.cat(text), torch.cat(audio), [speech.codes[0] for speech in said])


def _overlap(mine: Tensor, theirs: Tensor) -> Tensor:
    """[K, longer T] bool: where two clips are equal; nowhere beyond the end of the shorter one."""
    T = min(mine.shape[1], theirs.shape[1])
    equal = torch.zeros(mine.shape[0], max(mine.shape[1], theirs.shape[1]), dtype=torch.bool)
    equal[:, :T] = mine[:, :T] == theirs[:, :T]
    return equal


def _share(equal: Tensor) -> float:
    """The share of True; 1 where there is nothing to differ."""
    return equal.float().mean().item() if equal.numel() else 1.0
