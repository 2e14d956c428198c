"""How far a fine-tune has moved from its base where it should not: on a few records of other voices and languages.

KL divergence from the base's predictions to the model's, teacher-forced, mean over the records' targets: `drift_text`,
`drift_audio`, and their sum `drift`, in nats. An adapter is switched off for the base's predictions; of a full fine-tune they
are kept in OUTPUT/drift.safetensors before the first step.

Legend: n text targets, m audio targets of all codebooks, V text vocabulary, C audio vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from collate import Batch
from common import DataError, write_whole
from config import Config
from data import ChatMLDataset, Loader, open_records
from distributed import Dist
from loss import IGNORE_INDEX, LabelSpec, dense_targets
from prepare.encode import encode_missing
from prepare.manifest import Mixture

MAX_RECORDS = 8
FILE = "drift.safetensors"


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within this context a model with adapters is its base."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    scales = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.scaling.update(scale)


@dataclass
class Drift:
    """The records, every rank the same ones, and of a full fine-tune what the base predicted."""

    batches: Sequence[Batch]  # one record each
    labels: LabelSpec
    device: torch.device
    base: list[tuple[Tensor, Tensor]] | None = None

    @classmethod
    def build(cls, cfg: Config, loader: Loader, labels: LabelSpec, dist: Dist) -> Drift:
        """Read --drift_manifest; waveforms are encoded first. Collective. raises: DataError"""
        records, *_ = dist.together(lambda: open_records(cfg.drift_manifest))
        records, known = records.subset(np.arange(len(records)) < MAX_RECORDS), loader.dataset
        encode_missing(dist, known.store, [Mixture([records])])
        dataset = ChatMLDataset(records, known.tokenizer, known.store, known.with_waveforms)
        return cls(dist.together(lambda: [loader.collator([dataset[i]]) for i in range(len(records))]), labels, dist.device)

    def remember(self, model: nn.Module, file: Path, step: int, dist: Dist) -> None:
        """Keep what the base predicts, or read what was kept; for a full fine-tune. Collective. raises: DataError"""
        if not step:
            self.base = [self._predict(model, batch) for batch in self.batches]
            named = {f"{i}.{name}": t.cpu() for i, pair in enumerate(self.base) for name, t in zip(("text", "audio"), pair)}
            dist.together(lambda: write_whole(file, lambda out: out.write(save(named))) if dist.is_main else None)
            return
        try:
            kept = dist.together(lambda: load_file(file))
            self.base = [(kept[f"{i}.text"], kept[f"{i}.audio"]) for i in range(len(self.batches))]
        except (OSError, SafetensorError, KeyError):
            raise DataError(f"{file}: --drift_manifest needs what the base predicted, from before the first step") from None

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The figures, for a model in evaluation mode. Collective."""
        sums = torch.zeros(2, 2)  # of text and audio: nats, targets
        for index, batch in enumerate(self.batches):
            now = self._predict(model, batch)
            if self.base is None:
                with adapter_off(model):
                    before = self._predict(model, batch)
            else:
                before = self.base[index]
            for row, p, q in zip(sums, before, now):
                p = p.to(self.device)
                row += torch.stack([(p.exp() * (p - q)).sum().cpu(), torch.tensor(float(len(p)))])
        text, audio = (nats / max(1.0, count) for nats, count in sums.tolist())
        return {"drift": text + audio, "drift_text": text, "drift_audio": audio}

    @torch.no_grad()
    def _predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the record's targets: text [n, V], audio [m, C], float32."""
        batch = batch.to(self.device)
        output = model(**batch.model_inputs())
        text, audio = dense_targets(output, batch, self.labels)
        codes = output.audio_logits[audio.labels != IGNORE_INDEX]
        return output.logits.flatten(0, 1)[text.rows].float().log_softmax(-1), codes.float().log_softmax(-1)
