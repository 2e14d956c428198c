"""Finished models: written at the end of training, converted, merged, averaged, described.

A finished model is a folder that others load: a full checkpoint in one of the two layouts of layouts.py, or a LoRA adapter
in PEFT's format. README.md in it says what it was made from and how.

    python checkpoint.py FOLDER                            # what a folder holds
    python checkpoint.py export FOLDER OUT [--layout L]    # FOLDER: a full checkpoint, or OUTPUT/checkpoints/step_N
    python checkpoint.py merge ADAPTER [BASE] OUT [--layout L] [--manifest M]
    python checkpoint.py average FOLDER FOLDER ... OUT [--layout L]

Tensors pass through one at a time, so memory holds one output file's worth (MAX_FILE_BYTES), never the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

import card
import checkpoint
import layouts
import model_patch
from checkpoint import CheckpointError, Stored, is_lora
from config import Config
from distributed import says_errors

MAX_FILE_BYTES = 5_000_000_000
# Files beside the weights that belong to a layout; a model written in the layout it came in keeps them.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
)
ADAPTER_PREFIX = "base_model.model."  # PEFT's, before the name of a module
NO_EFFECT = 1e-7  # a change of this share of a weight's norm is lost in float32 rounding
TINY = torch.finfo(torch.float32).tiny

Named = Iterable[tuple[str, Tensor]]

# ---------------------------------------------------------------------------------------------------------------------
# Models on disk


class Full:
    """A full checkpoint in either layout, read one tensor at a time by the names of the original layout.

    trained: a training state, whose tensors take the place of the folder's
    base:    what the folder is called where that is more than its path: the name of a Hub repository
    raises:  CheckpointError if the folder is none
    """

    def __init__(self, folder: Path, trained: Stored | None = None, base: str = ""):
        self.folder = trained.folder if trained else folder
        self.config_folder, self.base = folder, base
        self.config = checkpoint.read_base_config(folder)
        self.tokenizer = checkpoint.load_tokenizer(folder)
        self._stored, self._trained = Stored(folder), trained
        self._names = {layouts.rename(name, "boson"): name for name in self._stored.shapes}
        self.shapes = {name: self._stored.shapes[stored] for name, stored in self._names.items()}
        # Master weights are written as the end of training writes them, anything else as it is.
        self.dtype = (self.config.torch_dtype or torch.float32) if trained else None

    def read(self, name: str) -> Tensor:
        trained = self._trained and _state_name(name, self._trained)
        if trained:
            return self._trained.read(trained)
        return self._stored.read(self._names[name])


class Adapter:
    """A LoRA adapter, read one tensor at a time by PEFT's names.

    names:  PEFT's name of each tensor -> its name in `stored`
    raises: CheckpointError if it is not plain LoRA, whose change of a layer is scale * B @ A
    """

    dtype = None  # what it is written as: as it is

    def __init__(self, lora: LoraConfig, names: dict[str, str], stored: Stored, tokenizer: PreTrainedTokenizerBase | None):
        self.lora, self.tokenizer, self.folder = lora, tokenizer, stored.folder
        self.base = lora.base_model_name_or_path or ""
        self._names, self._stored = names, stored
        self.shapes = {name: stored.shapes[stored_name] for name, stored_name in names.items()}
        self.scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
        self.modules = sorted({re.sub(r"\.lora_[AB]\.weight$", "", name.removeprefix(ADAPTER_PREFIX)) for name in names})
        expected = {_factor(module, factor) for module in self.modules for factor in "AB"}
        special = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
        odd = [name for name in special if getattr(lora, name, None)] + sorted(names.keys() ^ expected)[:1]
        odd += [name for name in names if lora.r not in self.shapes[name]][:1]
        if odd or lora.bias != "none":
            raise CheckpointError(f"{self.folder}: not a plain LoRA adapter ({', '.join(odd) or 'it trains biases'})")

    def read(self, name: str) -> Tensor:
        return self._stored.read(self._names[name])

    def change(self, module: str) -> Tensor:
        """What the adapter adds to a layer's weight: [out, in] float32."""
        A, B = (self.read(_factor(module, factor)).float() for factor in "AB")
        return self.scale * (B @ A)

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of the layer it belongs to."""
        return self.shapes[_factor(module, "B")][0], self.shapes[_factor(module, "A")][1]


def open_model(folder: Path) -> Full | Adapter:
    """Whatever model the folder holds; CheckpointError if it holds none."""
    if (folder / checkpoint.STATE_FILE).is_file():
        return _open_state(folder)
    if not (folder / "adapter_config.json").is_file():
        return Full(folder)
    try:
        kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
        lora = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: adapter_config.json is not a LoRA adapter's: {error!r}") from None
    if lora is None:
        raise CheckpointError(f"{folder}: a {kind} adapter, expected LORA")
    stored = Stored(folder)
    tokenizer = checkpoint.load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else None
    return Adapter(lora, {name: name for name in stored.shapes}, stored, tokenizer)


def _open_state(folder: Path) -> Full | Adapter:
    """The model that OUTPUT/checkpoints/step_N would have become, had the run ended there."""
    damage = checkpoint.find_damage(folder)
    if damage:
        raise CheckpointError(f"{folder}: {damage}")
    path = folder.resolve().parent.parent / "config.json"
    try:
        run = json.loads(path.read_text())
        cfg = Config(**{f.name: run[f.name] for f in dataclasses.fields(Config) if f.name in run})
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: the run's settings cannot be read: {path}: {error}") from None
    stored, base = Stored(folder), checkpoint.find_base(cfg.base_ckpt, cfg.revision)
    if not cfg.lora_r:
        return Full(base, trained=stored, base=cfg.base_ckpt)
    model = model_patch.build_on_meta(checkpoint.read_base_config(base))
    lora = model_patch.add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_list)
    lora.base_model_name_or_path, lora.revision = cfg.base_ckpt, cfg.revision
    parameters = [name.removeprefix("model.") for name in stored.shapes if name.startswith("model.")]
    names = {_adapter_name(name): _state_name(name, stored) for name in parameters}
    return Adapter(lora, names, stored, checkpoint.load_tokenizer(base))


def _state_name(name: str, state: Stored) -> str | None:
    """Where a training state holds what a finished model has of a parameter: its average, itself, or nowhere."""
    return next((found for found in (f"optimizer.{name}.ema", f"model.{name}") if found in state.shapes), None)


def _factor(module: str, factor: str) -> str:
    return f"{ADAPTER_PREFIX}{module}.lora_{factor}.weight"


def _adapter_name(name: str) -> str:
    """PEFT's name of an adapter weight in its files."""
    return ADAPTER_PREFIX + re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when everything has been written.

    raises: CheckpointError if the disk fails; what was at `folder` is untouched then
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_full(
    folder: Path,
    named: Named,
    config: HiggsAudioConfig,
    tokenizer: PreTrainedTokenizerBase,
    layout: layouts.Layout,
    base: Path,
    readme: str,
) -> None:
    """A full checkpoint in `layout`, from tensors by the names of the original layout.

    base: the checkpoint it came from, whose companion files a model of the same layout keeps
    """
    try:
        values = json.loads(config.to_json_string()) if layout == "boson" else layouts.to_transformers(config, tokenizer)
        made = {"config.json": values, "generation_config.json": layouts.generation_config(layout, config, tokenizer)}
    except ValueError as error:
        raise CheckpointError(f"{base}: {error}") from None
    same = layouts.layout_of(base) == layout
    with whole_folder(folder) as temporary:
        _write_weights(temporary, ((layouts.rename(name, layout), tensor) for name, tensor in named), "model", index=True)
        tokenizer.save_pretrained(temporary)
        for name in COMPANIONS:
            if same and (base / name).is_file():
                shutil.copy(base / name, temporary)
            elif name in made:
                (temporary / name).write_text(json.dumps(made[name], indent=2) + "\n")
        (temporary / "README.md").write_text(readme)


def write_adapter(folder: Path, named: Named, lora: LoraConfig, tokenizer: PreTrainedTokenizerBase | None, readme: str) -> None:
    """A PEFT adapter, from tensors by PEFT's names."""
    with whole_folder(folder) as temporary:
        _write_weights(temporary, named, "adapter_model", index=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        dataclasses.replace(lora, inference_mode=True).save_pretrained(temporary)
        (temporary / "README.md").write_text(readme)


def _write_weights(folder: Path, named: Named, stem: str, index: bool) -> None:
    """Tensors in files of at most MAX_FILE_BYTES, with the index that Hugging Face reads where there are several."""
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = num_files = 0
    file_of: dict[str, int] = {}

    def flush() -> None:
        nonlocal pending, pending_bytes, num_files
        num_files += 1
        checkpoint.save_tensors(pending, folder / f"{stem}-part{num_files}", metadata={"format": "pt"})
        file_of.update(dict.fromkeys(pending, num_files))
        pending, pending_bytes = {}, 0

    for name, tensor in named:
        if pending and pending_bytes + tensor.nbytes > MAX_FILE_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    names = {i: f"{stem}-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)}
    if num_files == 1:
        names = {1: f"{stem}.safetensors"}
    for i, name in names.items():
        os.replace(folder / f"{stem}-part{i}", folder / name)
    if index and num_files > 1:
        weights = {"metadata": {"total_size": total_bytes}, "weight_map": {n: names[i] for n, i in file_of.items()}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(weights, indent=2))


# ---------------------------------------------------------------------------------------------------------------------
# At the end of training


def write_final(
    output_dir: Path,
    model: nn.Module,
    config: HiggsAudioConfig,
    tokenizer: PreTrainedTokenizerBase,
    lora: LoraConfig | None,
    base: Path,
    merge_lora: bool = False,
) -> str | None:
    """OUTPUT/final from the sharded model: a full checkpoint in the base's dtype, or an adapter in float32. Collective.

    base:       folder of the base checkpoint
    merge_lora: also write OUTPUT/final/merged, the adapter merged into the base
    returns:    on rank 0, what merging did
    raises:     CheckpointError on all ranks if the disk fails

    Tensors are gathered one at a time, so rank 0 holds one output file's worth, never the whole model.
    """
    folder, report, error = output_dir / "final", None, None
    named = _gathered(model, adapter=lora is not None, dtype=None if lora else config.torch_dtype or torch.float32)
    try:
        if dist.get_rank() == 0:
            readme = card.of_run(output_dir)
            if lora is None:
                write_full(folder, named, config, tokenizer, "boson", base, readme)
            else:
                write_adapter(folder, named, lora, tokenizer, readme)
                if merge_lora:
                    report = str(merge(open_model(folder), Full(base), folder / "merged"))
    except CheckpointError as caught:
        error = caught
    for _ in named:  # the other ranks, and rank 0 after an error, go through the same collectives
        pass
    errors: list = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if errors[0]:
        raise errors[0]
    return report


def _gathered(model: nn.Module, adapter: bool, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, or its adapter's, whole on rank 0's CPU and by the names in files. Collective."""
    for name, parameter in model.named_parameters():
        if adapter and not is_lora(name):
            continue
        full = parameter.data.full_tensor() if isinstance(parameter.data, DTensor) else parameter.data
        if dist.get_rank() == 0:
            full = full.to("cpu", dtype or full.dtype)
        yield _adapter_name(name) if adapter else name, full


# ---------------------------------------------------------------------------------------------------------------------
# What an adapter does


def relative_changes(model: nn.Module) -> dict[str, float]:
    """How much each adapter of a sharded model changes its layer: |scale * B @ A| / |W|, Frobenius norms. Collective.

    The norm of B @ A comes from two r x r products, (B^T B) and (A A^T), so that no change is ever built.
    """
    changes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            A, B = (_whole(getattr(layer, f"lora_{factor}")["default"].weight).double() for factor in "AB")
            norm = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt() * layer.scaling["default"]
            weight = torch.linalg.vector_norm(layer.base_layer.weight.detach(), dtype=torch.float32)
            changes[name] = (norm / _whole(weight).clamp(min=TINY)).item()
    return changes


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def describe_changes(changes: dict[str, float]) -> str:
    """One line about `relative_changes`; it begins with "warning:" if the adapter has no effect."""
    unchanged = [name for name, change in changes.items() if change < NO_EFFECT]
    if len(unchanged) == len(changes):
        return f"warning: the adapter has no effect: it changes none of its {len(changes)} layers. Was it trained?"
    values = sorted(changes.values())
    line = f"the adapter changes its layers by {statistics.median(values):.2%} of their weights' norm (median; largest {values[-1]:.2%})"
    if unchanged:
        line += f"; {len(unchanged)} of {len(changes)} not at all, first {unchanged[0]}"
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Convert, merge, average


def convert(source: Full | Adapter, out: Path, layout: layouts.Layout = "boson", command: str = "") -> None:
    """Write a model again: in the other layout, or finished from a training state."""
    tensors = ((name, source.read(name)) for name in source.shapes)
    named = ((name, tensor.to(source.dtype or tensor.dtype)) for name, tensor in tensors)
    readme = card.of_model(f"Written from `{source.folder}`.", command, source.folder, source.base)
    if isinstance(source, Full):
        write_full(out, named, source.config, source.tokenizer, layout, source.config_folder, readme)
    else:
        write_adapter(out, named, source.lora, source.tokenizer, readme)


@dataclass
class MergeReport:
    """What merging did to each layer, as shares of Frobenius norms."""

    dtype: torch.dtype
    changes: dict[str, float]  # |change| / |W|
    rounding: dict[str, float]  # |merged as written - merged in float32| / |change|, where there is a change

    def add(self, module: str, weight: Tensor, change: Tensor, exact: Tensor) -> Tensor:
        """Note a layer; returns `exact`, its merged weight, in the dtype of `weight`."""
        written, size = exact.to(weight.dtype), change.norm().item()
        self.dtype = weight.dtype
        self.changes[module] = size / max(weight.float().norm().item(), TINY)
        if size:
            self.rounding[module] = (written.float() - exact).norm().item() / size
        return written

    def __str__(self) -> str:
        line = describe_changes(self.changes)
        if not any(self.rounding.values()):
            return line
        median, largest = statistics.median(self.rounding.values()), max(self.rounding.values())
        name = str(self.dtype).removeprefix("torch.")
        return f"{line}\nrounding to {name} adds an error of {median:.2%} of the change (median; largest {largest:.2%})"


def merge(adapter: Adapter, base: Full, out: Path, layout: layouts.Layout = "boson", command: str = "") -> MergeReport:
    """W + scale * B @ A, in float32, then in the dtype of W, tensor by tensor.

    raises: CheckpointError if the adapter is not one of this base
    """
    report = MergeReport(torch.float32, {}, {})
    readme = card.of_model(f"`{adapter.folder}` merged into `{base.folder}`.", command, adapter.folder, adapter.base)
    write_full(out, merged(adapter, base, report), base.config, base.tokenizer, layout, base.config_folder, readme)
    with open(out / "README.md", "a") as file:
        file.write(f"\n## Merging\n\n{report}\n")
    return report


def merged(adapter: Adapter, base: Full, report: MergeReport | None = None) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors: in the base's dtypes, described in `report`; without one, changed layers stay in float32."""
    for module in adapter.modules:
        if base.shapes.get(f"{module}.weight") != adapter.shape(module):
            raise CheckpointError(
                f"{adapter.folder} is no adapter of {base.folder}: it is made for {module}.weight of shape "
                f"{adapter.shape(module)}, here it is {base.shapes.get(f'{module}.weight')}"
            )
    changed = {f"{module}.weight": module for module in adapter.modules}
    for name in base.shapes:
        weight = base.read(name)
        if name in changed:
            change = adapter.change(changed[name])
            exact = weight.float() + change
            weight = report.add(changed[name], weight, change, exact) if report else exact
        yield name, weight


def average(sources: Sequence[Full | Adapter], out: Path, layout: layouts.Layout = "boson", command: str = "") -> str:
    """The mean of each tensor, accumulated in float32.

    returns: for adapters, how far the mean of the factors is from the mean of what they add
    raises:  CheckpointError if the sources are not alike
    """
    first, *others = sources
    for other in others:
        different = sorted(
            name for name in first.shapes.keys() | other.shapes.keys() if first.shapes.get(name) != other.shapes.get(name)
        )
        if type(other) is not type(first) or different:
            raise CheckpointError(f"{other.folder} and {first.folder} are not alike: {(different or ['another kind'])[0]}")
        if isinstance(first, Adapter) and other.scale != first.scale:
            raise CheckpointError(f"{other.folder} scales by {other.scale}, {first.folder} by {first.scale}")

    def mean(name: str) -> Tensor:
        start = first.read(name)
        total = start.to(torch.float32, copy=True)
        for other in others:
            total += other.read(name)
        return total.div_(len(sources)).to(first.dtype or start.dtype)

    named = ((name, mean(name)) for name in first.shapes)
    readme = card.of_model(
        f"The mean of {', '.join(f'`{source.folder}`' for source in sources)}.", command, first.folder, first.base
    )
    if isinstance(first, Full):
        write_full(out, named, first.config, first.tokenizer, layout, first.config_folder, readme)
        return ""
    write_adapter(out, named, first.lora, first.tokenizer, readme)
    result = open_model(out)
    apart = [_distance(sources, result, module) for module in first.modules]
    return (
        f"the mean's change of a layer is {statistics.median(apart):.2%} away from the mean of the changes (median; largest "
        f"{max(apart):.2%}): near 0 for checkpoints of one run, large for adapters that have nothing in common"
    )


def _distance(sources: Sequence[Adapter], result: Adapter, module: str) -> float:
    """|mean(B) @ mean(A) - mean(B @ A)| / |mean(B @ A)|: averaging factors is not averaging products."""
    mean = sum(source.change(module) for source in sources) / len(sources)
    return ((result.change(module) - mean).norm() / mean.norm().clamp(min=TINY)).item()


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def describe(folder: Path) -> str:
    """What a folder holds, in a few lines."""
    if (folder / "metrics.jsonl").is_file():
        states = [path.name for path in checkpoint.list_states(folder / "checkpoints")]
        finished = "finished: final" if (folder / "final").is_dir() else "not finished"
        return f"{folder}: a run, {finished}; checkpoints: {', '.join(states) or 'none'}"
    stored = Stored(folder)
    count = sum(torch.Size(shape).numel() for shape in stored.shapes.values())
    lines = [f"{folder}: {len(stored.shapes)} tensors, {count:,} numbers"]
    if (folder / checkpoint.STATE_FILE).is_file():
        state = checkpoint.read_state(folder)
        lines += ["a training state", json.dumps({name: value for name, value in state.items() if name != "files"}, indent=2)]
        return "\n".join(lines)
    model = open_model(folder)
    if isinstance(model, Adapter):
        lora = model.lora
        lines.append(f"a LoRA adapter, r={lora.r}, alpha={lora.lora_alpha}, of {len(model.modules)} layers")
        lines.append(f"base {lora.base_model_name_or_path}, revision {lora.revision}")
    else:
        c = model.config
        lines.append(f"a full checkpoint in the {layouts.layout_of(folder)} layout, {c.torch_dtype or 'dtype unknown'}")
        lines.append(f"{c.text_config.num_hidden_layers} layers, {c.audio_num_codebooks} codebooks of {c.audio_codebook_size}")
    return "\n".join(lines)


@says_errors
def main(argv: Sequence[str]) -> int:
    commands = {"export": _export, "merge": _merge, "average": _average}
    if not argv or argv[0] not in (*commands, "-h", "--help"):
        argv = ["show", *argv]
    args = _parser().parse_args(argv)
    command = shlex.join(["python", "checkpoint.py", *argv])
    if args.command == "show":
        print(describe(args.folder))
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise CheckpointError(f"{args.out} exists already; choose another folder")
    else:
        commands[args.command](args, command)
        print(f"written: {args.out}")
    return 0


def _export(args: argparse.Namespace, command: str) -> None:
    source = open_model(checkpoint.find_base(args.folder, args.revision))
    if isinstance(source, Adapter) and args.layout != "boson":
        raise CheckpointError(f"{args.folder} is an adapter, which has no layout; merge it with --layout {args.layout}")
    convert(source, args.out, args.layout, command)


def _merge(args: argparse.Namespace, command: str) -> None:
    adapter = open_model(args.adapter)
    if not isinstance(adapter, Adapter):
        raise CheckpointError(f"{args.adapter} is not an adapter")
    base = args.base or adapter.lora.base_model_name_or_path
    if not base:
        raise CheckpointError(f"{args.adapter} does not name its base; name it: merge ADAPTER BASE OUT")
    base = Full(checkpoint.find_base(base, adapter.lora.revision if base == adapter.lora.base_model_name_or_path else None))
    print(merge(adapter, base, args.out, args.layout, command))
    if args.manifest:
        from tools import parity  # the model in memory, which only this option needs

        report = parity.compare(adapter, base, args.manifest, args.records, args.audio_tokenizer)
        print(report)
        with open(args.out / "README.md", "a") as file:
            file.write(f"\n```\n{report}\n```\n")


def _average(args: argparse.Namespace, command: str) -> None:
    report = average([open_model(folder) for folder in args.folders], args.out, args.layout, command)
    if report:
        print(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what a folder holds")
    show.add_argument("folder", type=Path)
    export = commands.add_parser("export", help="write a model again, in either layout, or finish a training state")
    export.add_argument("folder", help="a full checkpoint here or on the Hub, an adapter, or OUTPUT/checkpoints/step_N")
    export.add_argument("--revision", help="of a Hub repository; default: the original layout of the published checkpoint")
    merge = commands.add_parser("merge", help="add an adapter's changes to the base's weights")
    merge.add_argument("adapter", type=Path, help="a PEFT adapter, or OUTPUT/checkpoints/step_N of a LoRA run")
    merge.add_argument("base", nargs="?", help="a folder or a Hub repository; default: the one that the adapter names")
    merge.add_argument("--manifest", type=Path, help="compare adapter and merged models on these records")
    merge.add_argument("--records", type=int, default=4, help="how many of them (default: 4)")
    merge.add_argument("--audio_tokenizer", default="bosonai/higgs-audio-v2-tokenizer", help="codec, where they name waveforms")
    average = commands.add_parser("average", help="the mean of several checkpoints")
    average.add_argument("folders", type=Path, nargs="+", help="full checkpoints, adapters or training states, all of a kind")
    for command in (export, merge, average):
        command.add_argument("out", type=Path, help="a folder that does not exist yet")
        command.add_argument("--layout", choices=layouts.LAYOUTS.values(), default="boson")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
