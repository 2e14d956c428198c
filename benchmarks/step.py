"""A training step of ours beside a plain reference, in one run: speed, memory, use of the hardware.

    python benchmarks/step.py --size mini                         # ours and the reference in turn, step by step
    python benchmarks/step.py --size vocab
    python benchmarks/step.py --size real --device cuda --lora_r 16 --activation_checkpointing full
    python benchmarks/step.py --size mini --scaling               # how time and memory grow with length and batch

Any flag of train.py may follow. The default is a full fine-tune in micro-batches of 8 samples, float32 on a CPU and bf16 on a
GPU. Ours is what train.py runs: `build_model`, `build_loaders`, `train_step`. The *plain reference* trains the same weights on the
same samples as public trainers do: the unpatched model, the official collator's padded batches, dense float32 cross-entropy over
all positions of both streams, fused AdamW, gradient clipping; on a GPU all in bf16, because upstream fails under autocast.

Voices are random codes, references of 3 to 10 s and targets of 2 to 20 s, uniformly drawn, with 4 text tokens per second.
Real tokens are positions after expansion without padding. Useful FLOPs are defined in `metrics.Flops`; what they are
compared with is a large matrix product, measured before every pair of steps. Figures are medians over steps. Peak memory
is that of tensors: on a GPU by its allocator, on a CPU by tools/memory.py, in a step of its own.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from torch import Tensor, nn

import metrics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import data  # noqa: E402
import loss  # noqa: E402
import model_patch  # noqa: E402
import train  # noqa: E402
from collate import Batch, create_collator  # noqa: E402
from loss import IGNORE_INDEX  # noqa: E402
from config import Config, parse_config, to_argv  # noqa: E402
from distributed import Dist, setup_distributed  # noqa: E402
from tools import plan, synthetic  # noqa: E402
from tools.memory import LiveBytes, resident_bytes  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What takes a step


@dataclass
class Micro:
    """The same samples, collated for both; collating is the workers' time, not the step's."""

    ours: Batch
    padded: HiggsAudioBatchInput  # the official collator's


class Ours:
    """What train.py runs."""

    name = "ours"

    def __init__(self, cfg: Config, dist: Dist, config: HiggsAudioConfig):
        self.lr = cfg.peak_lr
        self.model, _ = train.build_model(cfg, dist, config, Path(cfg.base_ckpt))
        self.model.train()
        self.optimizer = train.build_optimizer(self.model, cfg)
        objective, labels = train.build_objective(cfg, config), loss.LabelSpec.of(config)
        self.task = train.Task(self.model, self.optimizer, objective, labels, dist, cfg.grad_clip, cfg.seed)

    def step(self, micro: Micro) -> float:
        """One optimizer step; returns its loss."""
        result = train.train_step(self.task, [micro.ours], step=0, lr=self.lr)
        assert not result.culprits, "the step was skipped"
        return self.task.objective.metrics(result.total.losses)["loss"]


class Reference:
    """What public trainers run."""

    name = "reference"

    def __init__(self, cfg: Config, dist: Dist, config: HiggsAudioConfig):
        dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
        self.device, self.grad_clip = dist.device, cfg.grad_clip
        self.model = HiggsAudioModel.from_pretrained(cfg.base_ckpt, torch_dtype=dtype).to(self.device).train()
        if cfg.lora_r:
            model_patch.add_lora(self.model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_list)
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
    """Write checkpoint and manifest into the folder, unless they are there; the settings that use them."""
    config = synthetic.make_config(size)
    manifest = folder / f"{stretch:g}" / "clones.jsonl"
    if not manifest.is_file():
        synthetic.write_clones(manifest.parent, synthetic.clone_durations(num_samples, stretch), config.audio_codebook_size)
    defaults = {
        "train_manifest": manifest,
        "output_dir": folder / "out",
        "base_ckpt": folder / "checkpoint",
        "audio_tokenizer": "none",
        "batch_size": 8,
        "lora_r": 0,
        "num_workers": 0,
    }
    given = to_argv(defaults)
    cfg = parse_config([*given, *flags])
    on_gpu = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    if not on_gpu and "--mixed_precision" not in flags:
        cfg = parse_config([*given, "--mixed_precision", "no", *flags])
    if not (folder / "checkpoint" / "config.json").is_file():
        synthetic.make_checkpoint(folder / "checkpoint", config, torch.bfloat16 if size == "real" else torch.float32)
    return cfg


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


def micro_batches(cfg: Config, dist: Dist, config: HiggsAudioConfig) -> Iterator[Micro]:
    """The micro-batches of train.py's own loader, epoch after epoch, beside the official collator's of the same samples."""
    collator = official_collator(config)
    tokenizer = checkpoint.load_tokenizer(Path(cfg.base_ckpt))
    records, _ = train.read_records(cfg, dist)
    loader, _ = train.build_loaders(cfg, dist, config, tokenizer, records, None)
    by_source = {record.source: index for index, record in enumerate(loader.dataset.records)}
    for (batch, *_), _ in train.iter_steps(loader, data.Position(0, 0)):
        yield Micro(batch, collator([loader.dataset[by_source[source]] for source in batch.sources]))


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


@dataclass
class Figures:
    """What was measured of one contender."""

    tokens_per_sec: list[float] = field(default_factory=list)  # one per step
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


def measure(
    contenders: Sequence[Ours | Reference], micros: Iterator[Micro], flops: metrics.Flops, num_steps: int, dist: Dist
):
    """Let the contenders take the same steps in turn; returns {name: Figures} and the measured peak, FLOP/s."""
    dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
    figures = {contender.name: Figures() for contender in contenders}
    first = next(micros)
    for contender in contenders:
        contender.step(first)  # allocates the optimizer's state, warms up
        figures[contender.name].peak_bytes = peak_memory(contender, first, dist.device)
    peaks = []
    for _ in range(num_steps):
        micro = next(micros)
        work = micro.ours.packing.work()
        peaks.append(peak_flops(dist.device, dtype))
        for contender in contenders:
            seconds = timed(dist.device, lambda contender=contender, micro=micro: contender.step(micro))
            found = figures[contender.name]
            found.step_sec.append(seconds)
            found.tokens_per_sec.append(work[0] / seconds)
            found.audio_sec_per_sec.append(micro.ours.num_frames() / synthetic.FRAME_RATE_HZ / seconds)
            found.utilisation.append(flops.total(*work) / seconds / peaks[-1])
    return figures, statistics.median(peaks)


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
    spoken = torch.randn(micro.ours.audio_out_ids.shape[1], D, requires_grad=True)
    stream_eos = config.audio_stream_eos_id

    def ours() -> None:
        heads = ((text_head, packing.text), (audio_head, packing.audio))
        text, audio = (loss.score_head(hidden.index_select(0, t.rows), head, t) for head, t in heads)
        sums = loss.LossSums.of(packing.text, text, packing.audio, audio, stream_eos)
        (sums.text.nats.sum() + sums.audio.nats.sum()).backward()

    def reference() -> None:
        audio_logits = audio_head(spoken).view(len(spoken), config.audio_num_codebooks, -1)
        dense_loss(text_head(padded), labels, audio_logits, micro.ours.label_audio_ids).backward()

    found = {}
    for function in (ours, reference):
        text_head.zero_grad()
        audio_head.zero_grad()
        with LiveBytes() as live:
            function()
        found[function.__name__] = live.peak
        hidden.grad = padded.grad = spoken.grad = None
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
        f"### {size}\n\n`python benchmarks/step.py {' '.join(argv)}`, commit {git.stdout.strip()}{' + changes' * bool(changed)}, "
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {dist.world_size} rank(s), {device}; "
        f"matrix product {peak / scale:.0f} {unit}\n"
    )


def table(figures: dict[str, Figures]) -> str:
    lines = [
        "| | real tokens/s | audio s/s | step | useful FLOPs of the matrix product's | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in figures.items():
        tokens, audio, seconds, used = (
            statistics.median(values)
            for values in (found.tokens_per_sec, found.audio_sec_per_sec, found.step_sec, found.utilisation)
        )
        lines.append(
            f"| {name} | {tokens:,.0f} | {audio:.1f} | {seconds:.3g} s | {used:.0%} | {found.peak_bytes / 2**30:.2f} GiB |"
        )
    if len(figures) > 1:
        ours, reference = figures["ours"], figures["reference"]
        faster = statistics.median(b / a for a, b in zip(ours.step_sec, reference.step_sec))
        lines.append(
            f"\nOurs takes {1 / faster:.2f} of the reference's time ({faster:.2f}x the tokens per second) and "
            f"{ours.peak_bytes / reference.peak_bytes:.2f} of its memory; {len(ours.step_sec)} steps each, in turn."
        )
    return "\n".join(lines)


def compare(args: argparse.Namespace, flags: Sequence[str], folder: Path) -> str:
    cfg = prepare(folder, args.size, flags, args.samples)
    dist = setup_distributed(cfg.device)
    config = checkpoint.read_base_config(Path(cfg.base_ckpt))
    kinds = [Ours] if args.no_reference or dist.world_size > 1 else [Ours, Reference]
    # One after the other where two do not fit, else in turn: noise of the machine then meets both.
    rounds = [[kind] for kind in kinds] if args.size == "real" else [kinds]
    figures, flops = {}, None
    for group in rounds:
        contenders = [kind(cfg, dist, config) for kind in group]
        flops = flops or metrics.Flops.of(contenders[0].model)
        found, peak = measure(contenders, micro_batches(cfg, dist, config), flops, args.steps, dist)
        figures |= found
        del contenders
        gc.collect()
    first = next(micro_batches(cfg, dist, config))  # in which peak memory was measured
    torch_dist.destroy_process_group()  # makes room for the planner's fake one
    planned = plan.estimate(cfg, config, first.ours, dist.world_size, on_gpu=dist.device.type == "cuda").peak
    report = [describe(args.size, dist, peak, args.argv), table(figures)]
    report.append(
        f"\n`tools.plan` says {planned / 2**30:.2f} GiB: {planned / figures['ours'].peak_bytes:.3f} of ours measured."
    )
    if args.size == "vocab":
        ours, reference = loss_part_memory(config, first).values()
        report.append(
            f"\nThe loss part (heads, cross-entropy, backward) has at most {ours / 2**20:,.0f} MiB alive, the reference's "
            f"{reference / 2**20:,.0f} MiB: 1/{reference / ours:.0f}."
        )
    return "\n".join(report)


def scaling(args: argparse.Namespace, flags: Sequence[str], folder: Path) -> str:
    """Ours at 1, 2 and 4 times the length, and at 1, 2 and 4 times the batch."""
    rows, base = [], None
    for what, stretch, batch in (
        ("1x", 1, 2),
        ("length 2x", 2, 2),
        ("length 4x", 4, 2),
        ("batch 2x", 1, 4),
        ("batch 4x", 1, 8),
    ):
        cfg = prepare(folder, args.size, [*flags, "--batch_size", str(batch)], args.samples, stretch)
        dist = setup_distributed(cfg.device)
        config = checkpoint.read_base_config(Path(cfg.base_ckpt))
        ours = Ours(cfg, dist, config)
        flops = metrics.Flops.of(ours.model)
        figures, peak = measure([ours], micro_batches(cfg, dist, config), flops, args.steps, dist)
        found = figures["ours"]
        rate = statistics.median(found.tokens_per_sec)
        base = base or rate
        rows.append(
            f"| {what} | {rate:,.0f} | {rate / base:.2f} | {statistics.median(found.step_sec):.3g} s | "
            f"{statistics.median(found.utilisation):.0%} | {found.peak_bytes / 2**30:.2f} GiB |"
        )
        del ours
        gc.collect()
    head = "| | real tokens/s | of 1x | step | useful FLOPs | peak memory |\n| --- | --- | --- | --- | --- | --- |"
    return "\n".join([describe(f"{args.size}, scaling", dist, peak, args.argv), head, *rows])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini", choices=synthetic.SIZES)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each")
    parser.add_argument("--samples", type=int, default=64, help="in the data set")
    parser.add_argument("--no_reference", action="store_true")
    parser.add_argument("--scaling", action="store_true", help="lengths and batches of 1x, 2x and 4x instead of the reference")
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
