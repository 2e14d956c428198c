"""A training step of ours beside plain references, in one run: speed, memory, use of the hardware.

    bash launch.sh bench step --size mini                         # ours and the references, in turn, step by step
    bash launch.sh bench step --size vocab --json step.json       # the figures as JSON, too
    bash launch.sh bench step --size real --device cuda --lora_r 16 --activation_checkpointing full
    bash launch.sh bench step --size mini --scaling               # time and memory by length and batch size

Any flag of train.py may follow. The default is a full fine-tune in micro-batches of 8 samples, float32 on a CPU and bf16 on
a GPU. *Ours* is what train.py runs: `build_model`, `build_loaders`, `train_step`. The *reference* trains the same weights on
the same samples as public trainers do: the unpatched model, the official collator's padded batches, dense float32
cross-entropy over all positions of both streams, fused AdamW, gradient clipping; on a GPU all in bf16, because upstream fails
under autocast. *Bucketed* is the same loop on the same samples, sorted by length before they are cut into batches.

Clips are random codes, references of 3 to 10 s and targets of 2 to 20 s, uniformly drawn, with 4 text tokens per second.
Real tokens are positions after expansion, without padding. Useful FLOPs are defined in `metrics.Flops`; they are compared
with a large matrix product, timed before every step. Figures are medians over steps. Peak memory is that of tensors in the
largest micro-batch: on a GPU by its allocator, on a CPU by tools/memory.py, in a step of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import loss  # noqa: E402
import metrics  # noqa: E402
import model_patch  # noqa: E402
import train  # noqa: E402
from collate import Batch, create_collator  # noqa: E402
from common import write_whole  # noqa: E402
from config import Config, parse_config, to_argv  # noqa: E402
from distributed import Dist, setup_distributed  # noqa: E402
from export import pretrained  # noqa: E402
from layers.optimizer import LossScale  # noqa: E402
from loss import IGNORE_INDEX  # noqa: E402
from tools import synthetic  # noqa: E402
from tools.estimate import estimate  # noqa: E402
from tools.memory import LiveBytes, resident_bytes  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Contenders


@dataclass
class Micro:
    """The same samples, collated for both; collating is the loader workers' time, not the step's."""

    indices: list[int]  # of the samples in the data set
    ours: Batch
    padded: HiggsAudioBatchInput  # by the official collator


class Ours:
    """What train.py runs."""

    def __init__(self, cfg: Config, dist: Dist, config: HiggsAudioConfig):
        self.lr = cfg.peak_lr
        self.model, _ = train.build_model(cfg, dist, config, Path(cfg.base_ckpt))
        self.model.train()
        self.optimizer = train.build_optimizer(self.model, cfg)
        objective, labels = train.build_objective(cfg, config), loss.LabelSpec.of(config)
        scale = LossScale.of(cfg.mixed_precision)
        self.task = train.Task(self.model, self.optimizer, objective, labels, dist, cfg.grad_clip, cfg.seed, scale)

    def step(self, micro: Micro) -> float:
        """One optimizer step; returns its loss."""
        result = train.train_step(self.task, [micro.ours], step=0, lr=self.lr)
        assert not result.culprits, "the step was skipped"
        return self.task.objective.metrics(result.total.losses)["loss"]


class Reference:
    """What public trainers run."""

    def __init__(self, cfg: Config, dist: Dist, config: HiggsAudioConfig):
        dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
        self.device, self.grad_clip = dist.device, cfg.grad_clip
        self.model = HiggsAudioModel.from_pretrained(cfg.base_ckpt, torch_dtype=dtype).to(self.device).train()
        if cfg.lora_r:
            model_patch.add_lora(self.model, **cfg.lora_settings)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=cfg.peak_lr, weight_decay=cfg.weight_decay, fused=True)

    def step(self, micro: Micro) -> float:
        """One optimizer step; returns its loss."""
        batch = {name: value for name, value in vars(micro.padded).items() if name != "reward"}
        batch = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        output = self.model(**batch)
        value = dense_loss(output.logits, output.expanded_labels, output.audio_logits, batch["label_audio_ids"])
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.item()


def dense_loss(logits: Tensor, labels: Tensor, audio_logits: Tensor, audio_labels: Tensor) -> Tensor:
    """Cross-entropy over all positions in float32: text, plus the mean over codebooks.

    logits: [B, S, V]; labels: [B, S]; audio_logits: [N, K, C]; audio_labels: [K, N]
    """
    text = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    audio = [
        F.cross_entropy(audio_logits[:-1, k].float(), audio_labels[k, 1:], ignore_index=IGNORE_INDEX)
        for k in range(len(audio_labels))
    ]
    return text + torch.stack(audio).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Data


def prepare(folder: Path, size: str, flags: Sequence[str], num_samples: int, stretch: float = 1.0) -> Config:
    """Write checkpoint and manifest into the folder, unless they are there; returns the settings that use them."""
    config = synthetic.make_config(size)
    manifest = folder / f"{stretch:g}" / "clones.jsonl"
    if not manifest.is_file():
        synthetic.write_clones(manifest.parent, synthetic.clone_durations(num_samples, stretch), config.audio_codebook_size)
    if not (folder / "checkpoint" / "config.json").is_file():
        synthetic.make_checkpoint(folder / "checkpoint", config, torch.bfloat16 if size == "real" else torch.float32)
    given = to_argv(
        {
            "train_manifest": manifest,
            "output_dir": folder / "out",
            "base_ckpt": folder / "checkpoint",
            "audio_tokenizer": "none",
            "batch_size": 8,
            "lora_r": 0,
            "num_workers": 0,
        }
    )
    cfg = parse_config([*given, *flags])
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    return cfg if on_gpu else parse_config([*given, "--mixed_precision", "no", *flags])


def official_collator(config: HiggsAudioConfig) -> HiggsAudioSampleCollator:
    ours = create_collator(config)
    names = ("audio_in_token_id", "audio_out_token_id", "pad_token_id", "audio_stream_bos_id", "audio_stream_eos_id")
    return HiggsAudioSampleCollator(
        whisper_processor=None,
        encode_whisper_embed=False,
        return_audio_in_tokens=True,
        audio_num_codebooks=config.audio_num_codebooks,
        use_delay_pattern=config.use_delay_pattern,
        **{name: getattr(ours, name) for name in names},
    )


class Samples:
    """Micro-batches of train.py's own loader, collated for both contenders."""

    def __init__(self, cfg: Config, dist: Dist, config: HiggsAudioConfig):
        tokenizer = pretrained.load_tokenizer(Path(cfg.base_ckpt))
        records, _ = data.read_records(cfg, dist)
        self.loader, _ = data.build_loaders(cfg, dist, config, tokenizer, records, None)
        self.collators = create_collator(config), official_collator(config)

    def collate(self, indices: Sequence[int]) -> Micro:
        # read again for each collator: the official one changes its samples
        ours, padded = (collate([self.loader.dataset[i] for i in indices]) for collate in self.collators)
        return Micro(list(indices), ours, padded)

    def shuffled(self, count: int) -> list[Micro]:
        """The loader's first micro-batches, epoch after epoch."""
        by_source = {record.source: index for index, record in enumerate(self.loader.dataset.records)}
        steps = islice(train.iter_steps(self.loader, data.Position(0, 0)), count)
        return [self.collate([by_source[source] for source in batch.sources]) for (batch, *_), _ in steps]

    def bucketed(self, micros: Sequence[Micro]) -> list[Micro]:
        """The samples of all micro-batches sorted by length, then cut into as many micro-batches."""
        pairs = sorted(pair for micro in micros for pair in zip(micro.ours.packing.layout.lengths, micro.indices))
        bounds = [round(i * len(pairs) / len(micros)) for i in range(len(micros) + 1)]
        return [self.collate([index for _, index in pairs[a:b]]) for a, b in pairwise(bounds)]


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


@dataclass
class Figures:
    """What was measured of one contender, a value for each step."""

    tokens_per_sec: list[float] = field(default_factory=list)
    utilisation: list[float] = field(default_factory=list)
    audio_sec_per_sec: list[float] = field(default_factory=list)
    step_sec: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of the best of a few large matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(device, lambda: a @ b) for _ in range(repeats))


def peak_memory(contender: Ours | Reference, micro: Micro, device: torch.device) -> int:
    """Bytes of the contender alone: what it keeps between steps, and the most that is alive above it during one."""
    resident = resident_bytes(contender.model, contender.optimizer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender.step(micro)
        return resident + torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        contender.step(micro)
    return resident + live.peak


def measure(turns: dict[str, tuple[Ours | Reference, Sequence[Micro]]], flops: metrics.Flops, dist: Dist):
    """Let contenders step through their micro-batches in turn; returns {name: Figures} and the measured peak, FLOP/s."""
    dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
    figures = {name: Figures() for name in turns}
    for name, (contender, micros) in turns.items():
        worst = max(micros, key=largest)
        if not contender.optimizer.state:
            contender.step(worst)  # allocates the optimizer's state, warms up
        figures[name].peak_bytes = peak_memory(contender, worst, dist.device)
    peaks = []
    for step in zip(*(micros for _, micros in turns.values())):
        for micro, (name, (contender, _)) in zip(step, turns.items()):
            peaks.append(peak_flops(dist.device, dtype))
            seconds = timed(dist.device, lambda contender=contender, micro=micro: contender.step(micro))
            found, work = figures[name], micro.ours.packing.work()
            found.step_sec.append(seconds)
            found.tokens_per_sec.append(work[0] / seconds)
            found.audio_sec_per_sec.append(micro.ours.num_frames / synthetic.FRAME_RATE_HZ / seconds)
            found.utilisation.append(flops.total(*work) / seconds / peaks[-1])
    return figures, statistics.median(peaks)


def largest(micro: Micro) -> int:
    """Sort key: positions, with the reference's padding."""
    return len(micro.indices) * max(micro.ours.packing.layout.lengths)


def ratios(figures: dict[str, Figures]) -> dict[str, float | None]:
    """Real tokens per second of ours by those of the references; None where one did not run.

    ratio:          the median over steps, each on the same samples
    ratio_bucketed: over all steps together, whose samples are the same
    """
    ours, reference, bucketed = (figures.get(name, Figures()).step_sec for name in ("ours", "reference", "bucketed"))
    return {
        "ratio": statistics.median(b / a for a, b in zip(ours, reference)) if reference else None,
        "ratio_bucketed": sum(bucketed) / sum(ours) if bucketed else None,
    }


def loss_part_memory(config: HiggsAudioConfig, micro: Micro) -> dict[str, int]:
    """{name: the most bytes alive, above its inputs and weights} of heads, cross-entropy and their backward pass, in float32.

    Hidden states are random; on the CPU, so that both are counted alike.
    """
    packing, D = micro.ours.packing, config.text_config.hidden_size
    text_head = nn.Linear(D, config.text_config.vocab_size, bias=False)
    audio_head = nn.Linear(D, config.audio_num_codebooks * (config.audio_codebook_size + 2), bias=False)
    hidden = torch.randn(packing.num_positions, D, requires_grad=True)
    lengths = packing.layout.lengths
    width = max(lengths)
    padded = torch.randn(len(lengths), width, D, requires_grad=True)
    labels = torch.full((len(lengths), width), IGNORE_INDEX)
    labels[:, 1] = 0
    audio_hidden = torch.randn(micro.ours.audio_out_ids.shape[1], D, requires_grad=True)
    stream_eos = config.audio_stream_eos_id

    def ours() -> None:
        heads = ((text_head, packing.text), (audio_head, packing.audio))
        text, audio = (loss.score_head(hidden.index_select(0, t.rows), head, t) for head, t in heads)
        sums = loss.LossSums.of(packing.text, text, packing.audio, audio, stream_eos)
        (sums.text.nats.sum() + sums.audio.nats.sum()).backward()

    def reference() -> None:
        audio_logits = audio_head(audio_hidden).view(len(audio_hidden), config.audio_num_codebooks, -1)
        dense_loss(text_head(padded), labels, audio_logits, micro.ours.label_audio_ids).backward()

    found = {}
    for function in (ours, reference):
        text_head.zero_grad()
        audio_head.zero_grad()
        with LiveBytes() as live:
            function()
        found[function.__name__] = live.peak
        hidden.grad = padded.grad = audio_hidden.grad = None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Report


def describe(size: str, dist: Dist, peak: float, argv: Sequence[str]) -> str:
    """What the figures below it were measured with."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    device = f"CPU, {torch.get_num_threads()} threads"
    if dist.device.type == "cuda":
        device = torch.cuda.get_device_name(dist.device)
    unit, scale = ("TFLOP/s", 1e12) if peak > 1e12 else ("GFLOP/s", 1e9)
    return (
        f"### {size}\n\n`bash launch.sh bench step {' '.join(argv)}`, commit {git.stdout.strip()}{' + changes' * bool(changed)}, "
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {dist.world_size} rank(s), {device}; "
        f"matrix product {peak / scale:.0f} {unit}\n"
    )


HEAD = "| | real tokens/s | audio s/s | step | useful FLOPs of the matrix product's | peak memory |\n" + "| --- " * 6 + "|"


def table(figures: dict[str, Figures]) -> str:
    lines = [HEAD]
    for name, found in figures.items():
        lists = (found.tokens_per_sec, found.audio_sec_per_sec, found.step_sec, found.utilisation)
        tokens, audio, seconds, used = map(statistics.median, lists)
        peak = f"{found.peak_bytes / 2**30:.2f} GiB"
        lines.append(f"| {name} | {tokens:,.0f} | {audio:.1f} | {seconds:.3g} s | {used:.0%} | {peak} |")
    return "\n".join(lines)


def compare(args: argparse.Namespace, flags: Sequence[str], folder: Path) -> str:
    cfg = prepare(folder, args.size, flags, args.samples)
    dist = setup_distributed(cfg.device)
    config = pretrained.read_base_config(Path(cfg.base_ckpt))
    samples = Samples(cfg, dist, config)
    shuffled = samples.shuffled(args.steps)
    alone = args.no_reference or dist.world_size > 1
    kinds = [Ours] if alone else [Ours, Reference]
    # All in turn, so that the machine's noise meets all alike; one after the other where two do not fit.
    rounds = [[kind] for kind in kinds] if args.size == "real" else [kinds]
    figures = {}
    for group in rounds:
        contenders = {kind: kind(cfg, dist, config) for kind in group}
        turns = {kind.__name__.lower(): (contender, shuffled) for kind, contender in contenders.items()}
        if Reference in contenders:
            turns["bucketed"] = contenders[Reference], samples.bucketed(shuffled)
        flops = metrics.Flops.of(next(iter(contenders.values())).model)
        found, peak = measure(turns, flops, dist)
        figures |= found
        del turns, contenders
        gc.collect()
    torch_dist.destroy_process_group()  # makes room for the planner's fake one
    worst = max(shuffled, key=largest)  # in which peak memory was measured
    planned = estimate(cfg, config, worst.ours, dist.world_size, on_gpu=dist.device.type == "cuda").peak
    report = [describe(args.size, dist, peak, args.argv), table(figures), ""]
    faster = ratios(figures)
    if not alone:
        report.append(
            f"Real tokens per second of ours: {faster['ratio']:.2f} times the reference's, "
            f"{faster['ratio_bucketed']:.2f} times those of the bucketed loop; {args.steps} steps each, in turn."
        )
    report.append(f"`plan` predicts {planned / 2**30:.2f} GiB: {planned / figures['ours'].peak_bytes:.3f} of ours measured.")
    if args.size == "vocab":
        ours, reference = loss_part_memory(config, worst).values()
        report.append(
            f"The loss part (heads, cross-entropy, backward) has at most {ours / 2**20:,.0f} MiB alive, the reference's "
            f"{reference / 2**20:,.0f} MiB: 1/{reference / ours:.0f}."
        )
    if args.json:
        found = {name: asdict(values) for name, values in figures.items()}
        values = {"size": args.size, **faster, "planned_peak_bytes": planned, "matmul_flops_per_sec": peak, "contenders": found}
        write_whole(args.json, lambda file: file.write(json.dumps(values, indent=2).encode() + b"\n"))
    return "\n".join(report)


def scaling(args: argparse.Namespace, flags: Sequence[str], folder: Path) -> str:
    """Ours at 1, 2 and 4 times the length, and at 1, 2 and 4 times the batch."""
    figures = {}
    for name, stretch, batch in (
        ("1x", 1, 2),
        ("length 2x", 2, 2),
        ("length 4x", 4, 2),
        ("batch 2x", 1, 4),
        ("batch 4x", 1, 8),
    ):
        cfg = prepare(folder, args.size, [*flags, "--batch_size", str(batch)], args.samples, stretch)
        dist = setup_distributed(cfg.device)
        config = pretrained.read_base_config(Path(cfg.base_ckpt))
        ours = Ours(cfg, dist, config)
        micros = Samples(cfg, dist, config).shuffled(args.steps)
        found, peak = measure({name: (ours, micros)}, metrics.Flops.of(ours.model), dist)
        figures |= found
        del ours
        gc.collect()
    return "\n".join([describe(f"{args.size}, scaling", dist, peak, args.argv), table(figures)])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bash launch.sh bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="mini", choices=synthetic.SIZES)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each")
    parser.add_argument("--samples", type=int, default=64, help="in the data set")
    parser.add_argument("--no_reference", action="store_true", help="ours alone")
    parser.add_argument("--scaling", action="store_true", help="ours alone, at 1x, 2x and 4x the length and the batch size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--folder", type=Path, help="keep checkpoint and data here; default: a temporary folder")
    args, flags = parser.parse_known_args(argv)
    args.argv = argv
    if args.size == "real" and not torch.cuda.is_available():
        print("### real\n\nNot measured: its weights, gradients and optimizer state are for a CUDA GPU, and none is here.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        report = (scaling if args.scaling else compare)(args, flags, args.folder or Path(temporary))
    print(report)


if __name__ == "__main__":
    main(sys.argv[1:])
