"""Where figures go: metrics.jsonl always, TensorBoard where it is installed, Weights & Biases on request.

Rank 0 writes; on other ranks a `Monitor` does nothing. metrics.jsonl and samples/ are complete by themselves:
`bash launch.sh report OUTPUT_DIR` makes a page of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile

from common import ConfigError, json_safe, write_text

if TYPE_CHECKING:
    from generate.pictures import Medium


class Monitor:
    """One run's figures: OUTPUT/metrics.jsonl, one JSON object a line, and the same in TensorBoard and Weights & Biases.

    settings:   the run's, for the record
    steps_done: what a resumed run repeats after that is dropped
    project:    of Weights & Biases; "" for none
    is_main:    other ranks write nothing
    redo:       splits whose line at `steps_done` is dropped too: they are evaluated again
    """

    def __init__(
        self,
        output_dir: Path,
        settings: dict,
        steps_done: int = 0,
        project: str = "",
        is_main: bool = True,
        redo: Collection[str] = (),
    ):
        self.path = output_dir / "metrics.jsonl"
        self.is_main = is_main
        self._waiting: list[str] = []  # lines that could not be written yet
        self._failures: Counter[str] = Counter()
        self.sinks: list[TensorBoard | WeightsAndBiases] = []
        if is_main and self.path.exists():  # a resumed run repeats the steps after its checkpoint
            lines = self.path.read_text().splitlines()
            kept = "".join(f"{line}\n" for line in lines if _is_done(line, steps_done, redo))
            write_text(self.path, kept)
        if is_main and importlib.util.find_spec("tensorboard"):
            folder = output_dir / "tensorboard"
            self._try("TensorBoard", lambda: self.sinks.append(TensorBoard(folder, settings, steps_done)))
        if is_main and project:
            self.sinks.append(WeightsAndBiases(output_dir, settings, project))

    def write(self, *, split: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; numbers and lists of numbers are curves elsewhere."""
        if not self.is_main:
            return
        self._waiting.append(json.dumps(json_safe({"split": split, "step": step, **values}), allow_nan=False) + "\n")
        self._try(str(self.path), self._append)
        curves = {f"{split}/{name}": value for name, value in flatten(values)}
        for sink in self.sinks:
            self._try(type(sink).__name__, functools.partial(sink.write, step, curves))

    def write_samples(self, step: int, media: Sequence[Medium]) -> None:
        for sink in self.sinks:
            self._try(type(sink).__name__, functools.partial(sink.write_samples, step, media))

    def _append(self) -> None:
        """Write the lines that wait, all or none."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write("".join(self._waiting))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._waiting.clear()

    def _try(self, name: str, write: Callable[[], object]) -> None:
        """Write; what fails ends no run: it is counted, and said when their number has doubled."""
        try:
            write()
        except Exception as error:  # the disk's, the network's, or a library's own
            self._failures[name] += 1
            count = self._failures[name]
            if count & (count - 1) == 0:
                waiting = f", {len(self._waiting)} lines wait" * (name == str(self.path))
                print(f"warning: {name}: failed {count} time(s){waiting}: {error}", file=sys.stderr, flush=True)


def _is_done(text: str, steps_done: int, redo: Collection[str]) -> bool:
    try:
        line = json.loads(text)
        return line["step"] < steps_done or (line["step"] == steps_done and line.get("split") not in redo)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # cut off by a kill, or of another version
        return False


def read_lines(path: Path) -> dict[str, list[dict]]:
    """The lines of a metrics.jsonl by split, but for a last one that is cut off: the run was killed, or is still writing.

    raises: OSError, ValueError
    """
    texts, found = path.read_text(encoding="utf-8").splitlines(), {}
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            found.setdefault(line["split"], []).append(line)
        except (ValueError, KeyError, TypeError):
            if number < len(texts):
                raise ValueError(f"{path} line {number}: not an object with `split` and `step`") from None
    return found


def flatten(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among values, those in lists by their index."""
    for name, value in values.items():
        for suffix, item in ((f"/{i}", v) for i, v in enumerate(value)) if isinstance(value, list) else [("", value)]:
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                yield name + suffix, item


class TensorBoard:
    """Curves and the settings; of each sample its text, its codes as a picture, and its sounds."""

    def __init__(self, folder: Path, settings: dict, steps_done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```", steps_done)

    def write(self, step: int, curves: dict[str, float]) -> None:
        for name, value in curves.items():
            self.writer.add_scalar(name, value, step)

    def write_samples(self, step: int, media: Sequence[Medium]) -> None:
        for medium in media:
            self.writer.add_text(f"{medium.tag}/text", medium.text, step)
            self.writer.add_image(f"{medium.tag}/codes", medium.picture, step, dataformats="HWC")
            for kind, path in medium.sounds.items():
                samples, rate = soundfile.read(path, dtype="float32")
                self.writer.add_audio(f"{medium.tag}/{kind}", samples[None], step, sample_rate=rate)
        self.writer.flush()


class WeightsAndBiases:
    """The same at wandb.ai, or in OUTPUT/wandb with WANDB_MODE=offline."""

    def __init__(self, output_dir: Path, settings: dict, project: str):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"--wandb: {error}; pip install wandb, or leave the flag out") from None
        self.wandb = wandb
        kept = output_dir / ".wandb-id"  # a resumed run goes on in the same place
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex[:12])
        where = {"project": project, "name": output_dir.name, "dir": str(output_dir)}
        where |= {"config": settings, "id": kept.read_text(), "resume": "allow"}
        try:
            self.run = wandb.init(**where)
        except wandb.Error as error:  # not logged in, no network
            print(f"warning: --wandb {project}: {error}; kept in {output_dir / 'wandb'}, for wandb sync", file=sys.stderr)
            self.run = wandb.init(**where, mode="offline")

    def write(self, step: int, curves: dict[str, float]) -> None:
        self.run.log(curves, step=step)

    def write_samples(self, step: int, media: Sequence[Medium]) -> None:
        found = {f"{medium.tag}/codes": self.wandb.Image(medium.picture, caption=medium.text) for medium in media}
        for medium in media:
            for kind, path in medium.sounds.items():
                found[f"{medium.tag}/{kind}"] = self.wandb.Audio(str(path), caption=medium.text)
        self.run.log(found, step=step)
