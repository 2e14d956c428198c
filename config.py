"""Every setting of a run: defaults < --config FILE < flags. All problems are reported together."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import ConfigError, listing, split_list
from process.files import as_line, read_lines
from process.flags import Flags

BASE_CKPT = "bosonai/higgs-audio-v2-generation-3B-base"
BASE_NAMES = (BASE_CKPT, "bosonai/higgs-tts-2-3b-base")  # its two names on the Hub
# The Hub's newer revisions hold the same weights in the transformers layout; this one is the original layout.
BASE_REVISION = "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
AUDIO_TOKENIZER = "bosonai/higgs-audio-v2-tokenizer"
# Of the codec, and of the HuBERT that it loads: the originals as well.
REVISIONS = {
    AUDIO_TOKENIZER: "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
    "bosonai/hubert_base": "d7a7039bd0d93005f6532853db1934722d9a5e02",
}
LORA_DEFAULT_TARGETS = ("self_attn", "mlp", "audio_mlp")
CODEBOOK_WEIGHTS = {"omnivoice": "8,8,6,6,4,4,2,2", "moshi": "100,1,1,1,1,1,1,1"}  # as those models were trained
SAMPLES = 4  # of a micro-batch, where nothing else is chosen
CHECKPOINTING_MODES = ("none", "full", "selective")
# Figures that can choose the best step; 1: more is better, -1: less, 0: best at 1. The second line is measured on samples.
BEST_BY = {
    "loss": -1,
    "text_loss": -1,
    "audio_loss": -1,
    "eos_loss": -1,
    "text_accuracy": 1,
    "audio_accuracy": 1,
    "eos_accuracy": 1,
}
OF_SAMPLES = {"stop_rate": 1, "duration_ratio": 0, "code_match": 1, "runaway_rate": -1}
OF_SAMPLES |= {"word_error_rate": -1, "speaker_similarity": 1}
BEST_BY |= {"drift": -1} | OF_SAMPLES


def base_revision(name: str, revision: str | None = None) -> str | None:
    """The revision of a Hub checkpoint to fetch: the original layout of the published one, else the one given."""
    return revision or (BASE_REVISION if name in BASE_NAMES else None)


def _setting(default: Any, help: str, *aliases: str, const: Any = None, choices: Sequence[str] | None = None) -> Any:
    """A Config field: its default, meaning and unit, other flag names, and its value when the flag stands alone."""
    metadata = {"help": help, "aliases": aliases, "const": const, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is made from these fields."""

    # Data
    train_manifest: str = _setting(
        "", "dataset to train on; several with weights: a.jsonl:2,b.jsonl:0.5", "train_data", "input_data"
    )
    val_manifest: str = _setting("", "dataset to evaluate on")
    val_share: float = _setting(0.02, "share of the training records held out to evaluate on, without --val_manifest; 0: none")
    codes_dir: str = _setting("", "cache of encoded waveforms, which runs may share; default: OUTPUT_DIR/codes")
    missing_audio: str = _setting("error", "records whose audio does not exist; skip lists them", choices=("error", "skip"))
    strict_audio: bool = _setting(
        False, "end the run at a record with more audio placeholders than clips, instead of leaving it untrained", const=True
    )
    max_bad_samples: float = _setting(
        0.05, "stop after more unreadable or clamped samples than this, which are left out; below 1: a share of all samples"
    )
    num_workers: int = _setting(2, "processes per rank that prepare batches", "dataloader_num_workers")

    # Model
    base_ckpt: str = _setting(BASE_CKPT, "checkpoint to start from: a folder, or a repository on the Hub")
    base_revision: str = _setting("", "revision of a Hub checkpoint; default: the original layout of the published one")
    audio_tokenizer: str = _setting(AUDIO_TOKENIZER, "audio codec: a folder, a repository on the Hub, or none")
    lora_r: int = _setting(16, "LoRA rank; 0: full fine-tune")
    lora_alpha: float = _setting(32.0, "LoRA scale numerator: updates are scaled by alpha / r")
    lora_dropout: float = _setting(0.0, "dropout before the LoRA matrices")
    use_rslora: bool = _setting(False, "rank-stabilised LoRA: updates are scaled by alpha / sqrt(r)", const=True)
    use_dora: bool = _setting(False, "DoRA: also train the norm of each row of the adapted weights; slower", const=True)
    lora_targets: str = _setting(",".join(LORA_DEFAULT_TARGETS), "comma-separated patterns of the modules that get an adapter")
    freeze: str = _setting("", "comma-separated patterns of the parameters that do not train")
    quantize: str = _setting(
        "none",
        "keep the layers' frozen weights in 4 bits (NF4), for LoRA on a small card",
        const="nf4",
        choices=("none", "nf4"),
    )
    merge_lora: bool = _setting(False, "also write final/merged: the adapter merged into the base", const=True)
    init_adapter: str = _setting("", "start LoRA from this adapter, run or checkpoint of one, of the same rank, alpha and targets")

    # Batches and length
    batch_size: int | None = _setting(
        None, "samples per micro-batch and rank; default: 4, or on a GPU the --max_tokens that fit and leave 50 steps an epoch"
    )
    max_tokens: int = _setting(
        0, "positions (text, frames and delay columns) per micro-batch and rank, instead of --batch_size; 0: off"
    )
    long: str = _setting("error", "samples longer than --max_tokens; crop: to whole turns", choices=("error", "skip", "crop"))
    grad_accum: int = _setting(1, "micro-batches per optimizer step and rank", "gradient_accumulation_steps")
    epochs: int = _setting(1, "passes over the training data")
    max_steps: int = _setting(0, "stop after this many optimizer steps; 0: after --epochs")

    # Optimizer and loss
    lr: float | None = _setting(None, "peak learning rate; default: 2e-4 for LoRA, 2e-5 for a full fine-tune", "learning_rate")
    loraplus_lr_ratio: float = _setting(1.0, "LoRA+: learning rate of LoRA's B as a multiple of A's; its authors use 16")
    warmup_steps: int | None = _setting(None, "steps of linear warm-up before the cosine decay; default: 3 % of the run")
    min_lr_ratio: float = _setting(0.0, "final learning rate as a share of the peak")
    weight_decay: float = _setting(0.0, "AdamW weight decay, on matrices only")
    beta2: float = _setting(0.95, "AdamW beta2")
    ema: float = _setting(0.0, "decay per step of a moving average of the weights, evaluated and exported; 0: off")
    grad_clip: float = _setting(1.0, "largest global gradient norm; 0: no clipping")
    text_loss_weight: float = _setting(1.0, "weight of the text loss")
    audio_loss_weight: float = _setting(1.0, "weight of the audio loss")
    consistency_loss_weight: float = _setting(0.0, "weight of the voice-consistency loss (InfoNCE); 0: off")
    codebook_weights: str = _setting(
        "", f"comma-separated weight of each codebook, normalised to mean 1, or {' or '.join(CODEBOOK_WEIGHTS)}; default: equal"
    )

    # Precision, memory and speed
    mixed_precision: str = _setting(
        "auto",
        "compute dtype; masters stay float32; auto is bf16, or on GPUs without it fp16 with a loss scale",
        const="bf16",
        choices=("auto", "bf16", "fp16", "no"),
    )
    activation_checkpointing: str | None = _setting(
        None,
        "what layers recompute in the backward pass; default: none, or what the default of --batch_size needs",
        "use_gradient_checkpointing",
        const="full",
        choices=CHECKPOINTING_MODES,
    )
    compile: bool = _setting(False, "torch.compile of the layers' element-wise work; takes minutes at the start", const=True)
    cpu_offload: bool = _setting(
        False, "keep sharded weights, gradients and optimizer state in host memory, where the optimizer runs", const=True
    )
    deterministic: bool = _setting(False, "make runs on the same GPUs equal to the bit; slower", const=True)
    replicate: int = _setting(1, "HSDP: groups that the ranks are divided into, each with a whole sharded model")
    device: str = _setting("auto", "where to run", choices=("auto", "cpu", "cuda"))

    # Evaluation, samples and checkpoints
    output_dir: str = _setting("", "where checkpoints, metrics and the finished model go")
    val_steps: int | None = _setting(
        None, "evaluate every so many steps; 0: at the end, and hold nothing out for it; default: once per epoch"
    )
    sample_steps: int | None = _setting(
        None, "generate samples of the validation set every so many steps, of the base too; 0: never; default: once per epoch"
    )
    num_samples: int = _setting(4, "how many samples")
    sample_texts: str = _setting(
        "", "samples of texts of your own as well: a file with a text per line, or JSONL as for generate"
    )
    sample_temperature: float = _setting(0.7, "sampling temperature for --sample_steps; 0: greedy")
    asr_model: str = _setting("", "speech recognition model (transformers) for the samples' word error rate")
    sv_model: str = _setting("", "speaker verification model (transformers) for the samples' speaker similarity")
    save_steps: int | None = _setting(
        None, "save a resumable checkpoint every so many steps; 0: never; default: once per epoch"
    )
    keep_last: int = _setting(2, "resumable checkpoints to keep, beside the best; 0: all")
    best_by: str = _setting(
        "loss",
        "figure of validation or samples that chooses the best step, which --save_steps keeps; '': none",
        choices=(*BEST_BY, ""),
    )
    patience: int = _setting(0, "stop after so many evaluations (or rounds of samples) without a better --best_by; 0: never")
    final: str = _setting("last", "the step that becomes final/: the last, or the best by --best_by", choices=("last", "best"))
    drift_manifest: str = _setting(
        "", "records of other voices and languages: how far predictions for them move from the base's"
    )
    resume: str = _setting("none", "auto: the newest checkpoint in output_dir; or a checkpoint's path", const="auto")
    resume_changed: bool = _setting(
        False, "resume although the training data or the base checkpoint has changed since; the epoch begins again", const=True
    )
    wandb: str = _setting("", "Weights & Biases project to log to as well", const="higgs-audio")

    # Health
    seed: int = _setting(0, "order of the data, dropout and adapter initialisation")
    max_bad_steps: int = _setting(10, "stop after so many steps in a row whose loss or gradient is not finite")
    spike_threshold: float = _setting(
        8.0, "keep the batches of a loss so many robust standard deviations above the running median; 0: off"
    )
    memory_snapshot: int = _setting(0, "write OUTPUT/memory-rankN.pickle, what the GPU holds, after this step; 0: never")
    dist_timeout: float = _setting(60.0, "minutes that ranks wait for each other before the run fails; downloads count")
    step_timeout: float = _setting(
        30.0, "minutes without progress after which a rank notes where it stands, in OUTPUT/stuck, and ends; 0: never"
    )
    verbose: bool = _setting(False, "show the first batch as well; OUTPUT/log.txt has it always", const=True)
    dry_run: bool = _setting(False, "build data and model, print counts, and exit", const=True)

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else (2e-4 if self.lora_r else 2e-5)

    @property
    def revision(self) -> str | None:
        return base_revision(self.base_ckpt, self.base_revision)

    @property
    def lora_settings(self) -> dict:
        """What `model_patch.add_lora` takes."""
        settings = {"r": self.lora_r, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        return settings | {"targets": split_list(self.lora_targets), "use_rslora": self.use_rslora, "use_dora": self.use_dora}

    @property
    def samples(self) -> int:
        """Of a micro-batch without --max_tokens."""
        return self.batch_size or SAMPLES

    @property
    def codec(self) -> str:
        """Folder or Hub name of the codec, "" for none."""
        return "" if self.audio_tokenizer == "none" else self.audio_tokenizer

    @property
    def codebook_weight_list(self) -> list[float]:
        given = CODEBOOK_WEIGHTS.get(self.codebook_weights, self.codebook_weights)
        return [float(weight) for weight in split_list(given)]


# What --help lists; the rest is listed by --help advanced.
BASIC = (
    *("train_manifest", "val_manifest", "codes_dir", "base_ckpt", "audio_tokenizer", "lora_r", "lora_alpha", "quantize"),
    *("merge_lora", "batch_size", "max_tokens", "grad_accum", "epochs", "max_steps", "lr", "warmup_steps", "mixed_precision"),
    *("activation_checkpointing", "device", "output_dir", "val_steps", "sample_steps", "num_samples", "sample_texts"),
    *("save_steps", "keep_last", "final", "resume", "seed", "dry_run"),
)
# What a run notes in config.json beside its settings; see lineage.write_config.
FACTS = ("training_samples", "run_id", "world_size", "git_commit", "versions", "launch")
# Where they are not given, a run that is continued keeps its own: earlier versions had other defaults.
OPEN = ("val_steps", "sample_steps", "save_steps", "warmup_steps", "batch_size", "max_tokens", "activation_checkpointing")
_REQUIRED = ("train_manifest", "output_dir")
_OF_ONE_RUN = ("output_dir", "resume", "resume_changed", "dry_run")


def parse_config(argv: Sequence[str], description: str | None = None, **defaults: Any) -> Config:
    """The command line as a Config; ConfigError with every problem at once. --help and --version end the process.

    defaults: settings that the command line need not give
    """
    flags = Flags(Config, BASIC, description)
    lines, config_file, problems = flags.read(argv, _version)
    if config_file:
        lines = [*read_lines(Path(config_file), flags, FACTS), *lines]
    values = defaults
    for line in lines:
        if problem := line.problem or line.store(values):
            problems.append(f"{line.where}{problem}")
    return checked(Config(**values), problems)


def checked(cfg: Config, problems: Sequence[str] = ()) -> Config:
    """The same, if nothing is impossible about it; ConfigError with `problems` and every other one."""
    problems = [*problems, *_find_problems(cfg)]
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else listing(f"{len(problems)} problems:", problems))
    return cfg


def _version() -> str:
    number = re.search(r'version = "(.+)"', (Path(__file__).parent / "pyproject.toml").read_text())[1]
    return f"higgs-audio-v2-trainer {number}, commit {code_commit() or 'unknown'}, torch {torch.__version__}"


def code_commit() -> str | None:
    """The commit of this code, None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None


def recipe(cfg: Config) -> str:
    """A file for --config that repeats a run: what differs from the defaults, which stand beside it."""
    changed = {f: value for f in dataclasses.fields(cfg) if (value := getattr(cfg, f.name)) != f.default}
    command = f"bash launch.sh --config {shlex.quote(f'{cfg.output_dir}/recipe.yaml')} --output_dir OTHER"
    title = f"# The settings of this run that are not the defaults. From the same folder, this repeats it:\n#   {command}\n"
    return title + "".join(as_line(f, value) for f, value in changed.items() if f.name not in _OF_ONE_RUN)


def to_argv(settings: Mapping[str, object]) -> list[str]:
    """The command line that `parse_config` reads these settings from."""
    return [str(item) for name, value in settings.items() for item in (f"--{name}", value)]


def _find_problems(cfg: Config) -> list[str]:
    """What is impossible about the settings by themselves, before any file is opened."""
    problems = [f"--{name} is required" for name in _REQUIRED if not getattr(cfg, name)]
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, (int, float)) and not (value >= 0 and math.isfinite(value)):
            problems.append(f"--{f.name} {value}: must be a finite number, 0 or more")
    problems += [f"--{n} {getattr(cfg, n)}: must be at least 1" for n in _AT_LEAST_1 if getattr(cfg, n) == 0]
    problems += [f"--{n} {getattr(cfg, n)}: must be below {limit}" for n, limit in _BELOW.items() if getattr(cfg, n) >= limit]
    is_quantized = cfg.quantize != "none"
    no_gpu, has_judge = not torch.cuda.is_available(), cfg.asr_model or cfg.sv_model
    recomputes, has_loss = cfg.activation_checkpointing == "selective", cfg.text_loss_weight or cfg.audio_loss_weight
    by, judges_step = cfg.best_by, cfg.patience or cfg.final == "best"
    has_val, has_samples = cfg.val_manifest or (cfg.val_steps != 0 and cfg.val_share), cfg.sample_steps != 0
    rules = {
        "--compile recomputes what is cheap; use --activation_checkpointing none or full with it": cfg.compile and recomputes,
        "--dist_timeout 0: ranks have to wait for each other": cfg.dist_timeout == 0,
        "--lr 0: nothing would be learned": cfg.lr == 0,
        "--text_loss_weight 0 --audio_loss_weight 0: nothing would be learned": not has_loss,
        "--merge_lora: there is no adapter to merge with --lora_r 0": cfg.merge_lora and not cfg.lora_r,
        "--init_adapter: a full fine-tune has no adapter; its --base_ckpt is any model": cfg.init_adapter and not cfg.lora_r,
        "--quantize nf4: only frozen weights can be quantised; train an adapter (--lora_r 16)": is_quantized and not cfg.lora_r,
        "--quantize nf4: goes with neither --cpu_offload, --replicate nor --compile": is_quantized
        and (cfg.cpu_offload or cfg.replicate > 1 or cfg.compile),
        "--lora_alpha 0: the adapter would have no effect": cfg.lora_r and cfg.lora_alpha == 0,
        "--loraplus_lr_ratio 0: nothing would be learned": cfg.lora_r and cfg.loraplus_lr_ratio == 0,
        "--use_rslora, --use_dora and --loraplus_lr_ratio are kinds of LoRA: give --lora_r 16": not cfg.lora_r
        and (cfg.use_rslora or cfg.use_dora or cfg.loraplus_lr_ratio != 1),
        "--use_dora: needs the base's weights in 16 bits; leave --quantize nf4 out": cfg.use_dora and is_quantized,
        "--asr_model and --sv_model judge waveforms, which need a codec: --audio_tokenizer none": has_judge and not cfg.codec,
        "--num_samples 0: at least 1 with --sample_steps": has_samples and cfg.num_samples < 1,
        "--sample_texts: samples are generated with --sample_steps": cfg.sample_texts and not has_samples,
        f"--best_by {by}: is measured on samples; give --sample_steps": by in OF_SAMPLES and not has_samples,
        f"--best_by {by}: needs --asr_model": by == "word_error_rate" and not cfg.asr_model,
        f"--best_by {by}: needs --sv_model": by == "speaker_similarity" and not cfg.sv_model,
        f"--best_by {by}: needs --drift_manifest": by == "drift" and not cfg.drift_manifest,
        "--patience and --final best need --best_by": not by and (cfg.patience or cfg.final == "best"),
        "--final best: checkpoints are kept with --save_steps": cfg.final == "best" and cfg.save_steps == 0,
        "--drift_manifest: is measured at evaluations; give --val_manifest or --val_steps": cfg.drift_manifest and not has_val,
        f"--best_by {by}: needs --val_manifest or --val_steps": judges_step and by not in ("", *OF_SAMPLES) and not has_val,
        "--memory_snapshot: there is no GPU in this run": cfg.memory_snapshot and (cfg.device == "cpu" or no_gpu),
        "--device cuda: this PyTorch sees no GPU": cfg.device == "cuda" and no_gpu,
    }
    problems += [problem for problem, found in rules.items() if found]
    try:
        weights = cfg.codebook_weight_list
        if weights and (min(weights) < 0 or sum(weights) <= 0):
            problems.append(f"--codebook_weights {cfg.codebook_weights}: weights are 0 or more, and not all 0")
    except ValueError:
        problems.append(f"--codebook_weights {cfg.codebook_weights}: expected comma-separated numbers")
    return problems


_AT_LEAST_1 = ("batch_size", "grad_accum", "epochs", "replicate")
_BELOW = {"seed": 2**31, "val_share": 1, "ema": 1, "lora_dropout": 1}
