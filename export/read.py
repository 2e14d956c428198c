"""Models on disk, read one tensor at a time: a full checkpoint in either layout, a LoRA adapter, or a training checkpoint."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import checkpoint
import model_patch
from common import CheckpointError, read_json
from config import Config
from export import layouts, pretrained
from export.pretrained import Stored

ADAPTER_PREFIX = "base_model.model."  # PEFT's, before the name of a module


class Full:
    """A full checkpoint in either layout, read one tensor at a time by the names of the original layout.

    dtype:  what tensors are written as; None: as they are
    raises: CheckpointError if this is not a checkpoint
    """

    dtype: torch.dtype | None = None

    def __init__(self, folder: Path):
        self.folder = self.config_folder = folder
        self.base = ""  # the name of the base on the Hub, if it has one
        self.config = pretrained.read_base_config(folder)
        self.tokenizer = pretrained.load_tokenizer(folder)
        stored = Stored(folder)
        self._take({layouts.rename(name, "boson"): (stored, name) for name in stored.shapes})

    @classmethod
    def of_state(cls, folder: Path, stored: Stored, cfg: Config, base: dict) -> Full:
        """The full model of a training checkpoint; what did not train comes from the base."""
        self = cls.__new__(cls)
        self.folder, self.config_folder, self.base = folder, _companions(folder, cfg), cfg.base_ckpt
        self.config = pretrained.read_base_config(self.config_folder)
        self.tokenizer = pretrained.load_tokenizer(self.config_folder)
        # Float32 master weights are written in the base's dtype, as at the end of training.
        self.dtype = self.config.torch_dtype or torch.float32
        names = [name for name, _ in model_patch.build_on_meta(self.config).named_parameters()]
        trained = {name: _state_name(name, stored) for name in names}
        frozen = {} if all(trained.values()) else Full(_find_base(folder, cfg, base))._sources
        self._take({name: (stored, trained[name]) if trained[name] else frozen[name] for name in names})
        return self

    def _take(self, sources: dict[str, tuple[Stored, str]]) -> None:
        self._sources = sources
        self.shapes = {name: stored.shapes[stored_name] for name, (stored, stored_name) in sources.items()}

    def read(self, name: str) -> Tensor:
        stored, stored_name = self._sources[name]
        return stored.read(stored_name)


class Adapter:
    """A LoRA adapter, read one tensor at a time by PEFT's names.

    names:  PEFT's name of each tensor -> its name in `stored`
    raises: CheckpointError if it is more than LoRA, which adds scale * B @ A to a layer's weight, or DoRA
    """

    dtype = None  # tensors keep theirs

    def __init__(self, lora: LoraConfig, names: dict[str, str], stored: Stored, tokenizer: PreTrainedTokenizerBase | None):
        self.lora, self.tokenizer, self.folder = lora, tokenizer, stored.folder
        self.base = lora.base_model_name_or_path or ""
        self._names, self._stored = names, stored
        self.shapes = {name: stored.shapes[stored_name] for name, stored_name in names.items()}
        self.scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
        self.modules = sorted(
            {re.sub(r"\.lora_([AB]\.weight|magnitude_vector)$", "", name.removeprefix(ADAPTER_PREFIX)) for name in names}
        )
        expected = {_factor(module, factor) for module in self.modules for factor in "AB"}
        expected |= {_magnitude(module) for module in self.modules if lora.use_dora}
        special = ("modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
        odd = [name for name in special if getattr(lora, name, None)] + sorted(names.keys() ^ expected)[:1]
        odd += [name for name in names if lora.r not in self.shapes[name] and not name.endswith("_vector")][:1]
        if odd or lora.bias != "none":
            raise CheckpointError(f"{self.folder}: not a plain LoRA adapter ({', '.join(odd) or 'it trains biases'})")

    def read(self, name: str) -> Tensor:
        return self._stored.read(self._names[name])

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """A layer's weight with the adapter: [out, in] float32."""
        result = weight.float() + self.change(module)
        return with_norms(result, self.read(_magnitude(module)).float()) if self.lora.use_dora else result

    def change(self, module: str) -> Tensor:
        """scale * B @ A, which the adapter adds to a layer's weight: [out, in] float32."""
        A, B = (self.read(_factor(module, factor)).float() for factor in "AB")
        return self.scale * (B @ A)

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of the layer."""
        return self.shapes[_factor(module, "B")][0], self.shapes[_factor(module, "A")][1]


def find_model(folder: Path) -> tuple[Path, str]:
    """(the model that a run's folder stands for, a line that says which and names the others); other folders as they are, and "".

    It is that of the best step, which the newest whole checkpoint notes, else final/, else the newest whole checkpoint.

    raises: CheckpointError if the run has saved nothing that is whole
    """
    states, final = checkpoint.list_states(folder / "checkpoints"), folder / "final"
    if not states and not (folder / "metrics.jsonl").is_file():
        return folder, ""
    whole = [state for state in states if not checkpoint.find_damage(state, sizes_only=True)]
    models = [final] * final.is_dir() + whole
    if not models:
        raise CheckpointError(f"{folder}: this run has neither final/ nor a whole checkpoint; bash launch.sh show {folder}")
    state = checkpoint.read_state(whole[-1]) if whole else {}
    best = state.get("best") or {}
    chosen = next((path for path in whole if path.name == f"step_{best.get('step')}"), None)
    if chosen and _is_final(final, chosen, whole[-1], state):
        chosen = final
    why = "the best by {metric}, {value:.4g} at step {step}".format(**best) if best else "no step is known as the best"
    why += " has no whole checkpoint" if best and not chosen else ""
    chosen = chosen or models[0 if models[0] == final else -1]
    others = ", ".join(str(path.relative_to(folder)) for path in models if path != chosen)
    listed = f"; others, which can be named instead: {others}" if others else ""
    return chosen, f"{folder} is a run; its model is {chosen} ({why}){listed}"


def _is_final(final: Path, best: Path, newest: Path, state: dict) -> bool:
    """Whether final/ is the best step's: written after the newest checkpoint, of whose step it is unless --final best."""
    is_of_step = best == newest or state.get("settings", {}).get("final") == "best"
    return is_of_step and final.is_dir() and final.stat().st_mtime >= (newest / checkpoint.STATE_FILE).stat().st_mtime


def open_model(folder: Path) -> Full | Adapter:
    """The model in a folder, or in the folder of a run; CheckpointError if there is none."""
    folder, _ = find_model(folder)
    if (folder / checkpoint.STATE_FILE).is_file():
        return _open_state(folder)
    if not (folder / "adapter_config.json").is_file():
        return Full(folder)
    try:
        kind = read_json(folder / "adapter_config.json")["peft_type"]
        lora = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
        if lora and not (isinstance(lora.r, int) and lora.r > 0 and isinstance(lora.lora_alpha, (int, float))):
            raise ValueError(f"r {lora.r!r}, lora_alpha {lora.lora_alpha!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{folder}: adapter_config.json is not a LoRA adapter's: {error!r}") from None
    if lora is None:
        raise CheckpointError(f"{folder}: a {kind} adapter, expected LORA")
    stored = Stored(folder)
    tokenizer = pretrained.load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else None
    return Adapter(lora, {name: name for name in stored.shapes}, stored, tokenizer)


def _open_state(folder: Path) -> Full | Adapter:
    """A training checkpoint as the model that the run would have written, had it ended there."""
    damage = checkpoint.find_damage(folder)
    if damage:
        raise CheckpointError(f"{folder}: {damage}")
    state, stored = checkpoint.read_state(folder), Stored(folder)
    cfg = _read_settings(folder, state)
    if not cfg.lora_r:
        return Full.of_state(folder, stored, cfg, state.get("base", {}))
    companions = _companions(folder, cfg)
    model = model_patch.build_on_meta(pretrained.read_base_config(companions))
    lora = model_patch.add_lora(model, **cfg.lora_settings)
    lora.base_model_name_or_path, lora.revision = cfg.base_ckpt, cfg.revision
    parameters = [name.removeprefix("model.") for name in stored.shapes if name.startswith("model.")]
    names = {adapter_name(name): _state_name(name, stored) for name in parameters}
    return Adapter(lora, names, stored, pretrained.load_tokenizer(companions))


def _read_settings(folder: Path, state: dict) -> Config:
    """The run's settings: in the checkpoint, or beside those of format 1."""
    path = folder.resolve().parent.parent / "config.json"
    try:
        run = state["settings"] if "settings" in state else read_json(path)
        return Config(**{f.name: run[f.name] for f in dataclasses.fields(Config) if f.name in run})
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: the run's settings cannot be read: {path}: {error}") from None


def _companions(folder: Path, cfg: Config) -> Path:
    """Where the base's configuration and tokenizer are: in the checkpoint, or for format 1 in the base itself."""
    own = folder / checkpoint.COMPANIONS
    return own if own.is_dir() else pretrained.find_base(cfg.base_ckpt, cfg.revision)


def _find_base(folder: Path, cfg: Config, base: dict) -> Path:
    """The base that a training checkpoint was made from; CheckpointError if it is another one now."""
    known = Path(base.get("folder", ""))
    found = known if known.is_absolute() and known.is_dir() else pretrained.find_base(cfg.base_ckpt, cfg.revision)
    if base.get("fingerprint", fingerprint := pretrained.fingerprint(found)) != fingerprint:
        raise CheckpointError(f"{folder}: {found} is not the base that it was trained from: its weights have changed")
    return found


def _state_name(name: str, state: Stored) -> str | None:
    """The name in a training state of what a finished model has of a parameter: its moving average, else itself."""
    return next((found for found in (f"optimizer.{name}.ema", f"model.{name}") if found in state.shapes), None)


def _factor(module: str, factor: str) -> str:
    return f"{ADAPTER_PREFIX}{module}.lora_{factor}.weight"


def _magnitude(module: str) -> str:
    return f"{ADAPTER_PREFIX}{module}.lora_magnitude_vector"


def with_norms(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's: the rows [out, in] with these norms [out]."""
    return weight * (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]


def adapter_name(name: str) -> str:
    """The name that PEFT's files give to an adapter weight."""
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return ADAPTER_PREFIX + re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)
