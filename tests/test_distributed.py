"""Several gloo ranks: equal to one, and no hang whatever their batches contain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_sample, open_dataset, run_ranks
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import data
import loss
import model_patch
import train
from collate import create_collator
from common import ConfigError, DataError
from export import pretrained
from layers.optimizer import RowsAdamW, update
from tools import toys as demo


def full(tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_a_little(
    dist, checkpoint_dir, manifest, lora_r: int, grad_accum: int, dropout: float, size: int | str = 2, flags: Sequence[str] = ()
):
    """Three steps from a checkpoint, of micro-batches of `size` samples or of a token budget ("tokens").

    returns: losses, gradient norms and the trained parameters
    """
    folder = Path(checkpoint_dir)
    config, tokenizer = pretrained.read_base_config(folder), demo.make_tokenizer()
    argv = ["--train_manifest", "m", "--output_dir", "o", "--mixed_precision", "no"]
    argv += ["--lora_r", str(lora_r), "--lora_dropout", str(dropout), *flags]
    cfg = train.parse_config(argv)
    model, _ = train.build_model(cfg, dist, config, folder)
    model.train()
    optimizer = train.build_optimizer(model, cfg)
    task = train.Task(model, optimizer, train.build_objective(cfg, config), loss.LabelSpec.of(config), dist)
    dataset = open_dataset(Path(manifest), config, tokenizer)
    collator = create_collator(config)
    lengths, _ = data.measure_lengths(dataset, collator)
    batching = data.Batching(max_tokens=250, lengths=lengths) if size == "tokens" else data.Batching(size)
    loader = data.Loader(dataset, collator, batching, dist.rank, dist.world_size, grad_accum)
    losses, norms = [], []
    for step, (batches, _) in zip(range(3), loader.epoch(data.Position(0, 0))):
        result = train.train_step(task, batches, step, lr=1e-3)
        assert not result.culprits
        losses.append(task.objective.metrics(result.total.losses)["loss"])
        norms.append(result.total.grad_norm)
    return losses, norms, {n: full(p) for n, p in model.named_parameters() if p.requires_grad}


def test_two_and_three_ranks_equal_one(toys, checkpoint_dir):
    """The same global batches of six micro-batches, with LoRA and its dropout.

    float32, measured after three AdamW steps: losses and norms within 1.2e-7 relative, parameters within 1.9e-6 (AdamW divides
    tiny gradients by their own size, which amplifies rounding; LoRA's A starts with tiny ones because B is zero).
    """
    args = str(checkpoint_dir), str(toys / "train.jsonl"), 4
    (one,) = run_ranks(train_a_little, 1, *args, 6, 0.1)
    for world_size, grad_accum in ((2, 3), (3, 2)):
        ranks = run_ranks(train_a_little, world_size, *args, grad_accum, 0.1)
        for losses, norms, parameters in ranks:
            assert losses == pytest.approx(one[0], rel=1e-5)
            assert norms == pytest.approx(one[1], rel=1e-5)
            assert distance(parameters, one[2]) < 1e-5


GROUPINGS = {  # world size -> (grad_accum, samples of a micro-batch), always 12 in a step, the last step has 7
    1: [(1, 12), (2, 6), (4, 3), (6, "tokens")],
    2: [(1, 6), (2, 3), (3, "tokens")],
    3: [(1, 4), (2, 2), (4, 1), (2, "tokens")],
}


def train_groupings(dist, *args) -> list:
    return [train_a_little(dist, *args, grad_accum, 0.0, size) for grad_accum, size in GROUPINGS[dist.world_size]]


@pytest.mark.parametrize("lora_r", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_depends_on_its_samples_alone(lora_r, toys, checkpoint_dir):
    """1, 2 and 3 ranks, accumulation 1, 2 and 4, by number and by tokens: the same global batches, divided differently.

    float32, measured after three AdamW steps: losses within 2e-7 relative, norms within 1.2e-7, parameters within 4.7e-7.
    """
    args = str(checkpoint_dir), str(toys / "train.jsonl"), lora_r
    found = [
        (size == "tokens", result)
        for world_size, groupings in GROUPINGS.items()
        for ranks in run_ranks(train_groupings, world_size, *args)
        for (_, size), result in zip(groupings, ranks)
    ]
    for by_tokens in (False, True):
        first, *others = [result for tokens, result in found if tokens == by_tokens]
        assert others
        for losses, norms, parameters in others:
            assert losses == pytest.approx(first[0], rel=1e-5)
            assert norms == pytest.approx(first[1], rel=1e-5)
            assert distance(parameters, first[2]) < 1e-5


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all parameters, relative to their norm."""
    difference = sum((found[name] - p).square().sum() for name, p in expected.items())
    return (difference / sum(p.square().sum() for p in expected.values())).sqrt().item()


def uneven_step(dist, kinds: list[str], tower: bool):
    """One step in which each rank has a batch of another kind; returns the loss and the gradient norm."""
    tokenizer = demo.make_tokenizer()
    config = demo.tiny_config(tokenizer)
    if tower:
        from test_collate import TOWER

        config = demo.tiny_config(
            tokenizer, audio_encoder_config=dict(TOWER), skip_audio_tower=False, encode_whisper_embed=True
        )
    model = model_patch.patch_for_training(make_model(config)).train()
    if dist.world_size > 1:
        model_patch.shard(model, dist.mesh, torch.float32)
    samples = {
        "audio": make_sample(tokenizer, ("user", "say"), ("assistant", 6)),
        "text": make_sample(tokenizer, ("user", "say"), ("assistant", "text alone")),
        "heard": make_sample(tokenizer, ("user", 5), ("assistant", 6)),
    }
    samples["untrained text"] = make_sample(tokenizer, ("user", "say"), ("assistant", 6))
    samples["untrained text"].label_ids[samples["untrained text"].input_ids != config.audio_out_token_idx] = -100
    if tower:
        from test_collate import with_waveforms

        samples["heard"] = with_waveforms(samples["heard"], 0.2)
    cfg = train.parse_config(["--train_manifest", "m", "--output_dir", "o"])
    collator = create_collator(config)
    mine = [collator([samples[kind]]) for kind in kinds[dist.rank :: dist.world_size]]
    if dist.world_size == 1:
        model.set_requires_gradient_sync, model.reshard = lambda flag: None, lambda: None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    objective, labels = train.build_objective(cfg, config), loss.LabelSpec.of(config)
    task = train.Task(model, optimizer, objective, labels, dist, grad_clip=0.0)
    with train.evaluating(model):  # there as well every rank has to enter every sharded module
        train.forward(model, mine[0], labels)
    result = train.train_step(task, mine, step=0, lr=1e-3)
    return objective.metrics(result.total.losses)["loss"], result.total.grad_norm


@pytest.mark.parametrize(
    ("kinds", "tower"),
    [(["text", "audio"], False), (["untrained text", "text"], False), (["heard", "text"], True), (["text", "heard"], True)],
)
def test_batches_without_audio_or_text_do_not_hang(kinds, tower):
    """Unequal kinds on two ranks give the step of one unsharded process; measured within 2e-7."""
    ranks = run_ranks(uneven_step, 2, kinds, tower)
    (alone,) = run_ranks(uneven_step, 1, kinds, tower)
    for values in ranks:
        assert values == pytest.approx(alone, rel=1e-5)


def train_replicated(dist, *args):
    return train_a_little(train.setup_distributed("cpu", replicate=2), *args)


def test_replicas_equal_shards(toys, checkpoint_dir):
    """HSDP with two replicas on two ranks: the same step as one rank; measured within 1.2e-7."""
    args = str(checkpoint_dir), str(toys / "train.jsonl"), 4
    (one,) = run_ranks(train_a_little, 1, *args, 2, 0.1)
    for losses, norms, _ in run_ranks(train_replicated, 2, *args, 1, 0.1):
        assert losses == pytest.approx(one[0], rel=1e-5) and norms == pytest.approx(one[1], rel=1e-5)


def raise_on_one(dist):
    def check():
        if dist.rank == 1:
            raise DataError("only rank 1 cannot read this")

    try:
        dist.together(check)
    except DataError as error:
        return str(error)


def test_an_error_on_one_rank_reaches_all():
    assert run_ranks(raise_on_one, 2) == ["only rank 1 cannot read this"] * 2


def disagree(dist, seeds: list[int], manifests: list[str]):
    """Ranks with these seeds, whose file m.jsonl has the content of these manifests."""
    argv = ["--train_manifest", "m.jsonl", "--output_dir", "o", "--seed", str(seeds[dist.rank])]
    try:
        train.check_agreement(train.parse_config(argv), dist, data.open_records(manifests[dist.rank])[0], None)
    except ConfigError as error:
        return str(error)


def test_ranks_that_disagree_do_not_start(toys):
    val, test = str(toys / "val.jsonl"), str(toys / "test.jsonl")
    message = "rank 2 disagrees with rank 0 about {}; start all nodes alike"
    assert run_ranks(disagree, 2, [0, 0], [val, val]) == [None, None]
    assert run_ranks(disagree, 3, [0, 0, 1], [val] * 3) == [message.format("--seed")] * 3
    assert run_ranks(disagree, 3, [0] * 3, [val, val, test]) == [message.format("the content of m.jsonl")] * 3


def poisoned_run(dist, checkpoint_dir: str, manifest: str, output_dir: str, poison: str):
    """A run in which the loss of some samples is NaN; returns what it logged, and whether every parameter is finite."""
    forward, messages = train.forward, []

    def poisoned(model, batch, *args):
        total, voices = forward(model, batch, *args)
        if any(poison in source for source in batch.sources) and torch.is_grad_enabled():
            total.losses.audio.nats = total.losses.audio.nats * float("nan")
        return total, voices

    train.forward, train.log = poisoned, lambda dist, message: messages.append(message)
    argv = f"--train_manifest {manifest} --base_ckpt {checkpoint_dir} --output_dir {output_dir} --device cpu --num_workers 0"
    model = train.train(
        train.parse_config([*argv.split(), "--batch_size", "2", "--save_steps", "3", "--val_steps", "0", "--sample_steps", "0", "--max_bad_steps", "2"]), dist
    )
    return messages, all(full(p).isfinite().all().item() for p in model.parameters())


def test_a_poisoned_sample_is_skipped_on_all_ranks_and_named(toys, checkpoint_dir, tmp_path):
    args = str(checkpoint_dir), str(toys / "train.jsonl"), str(tmp_path / "o"), "record 7 "
    for messages, is_finite in run_ranks(poisoned_run, 2, *args):
        assert is_finite
        (named,) = [message for message in messages if "not finite, skipped" in message]
        assert "record 7 " in named
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["loss"] is None]
    assert len(list((tmp_path / "o" / "spikes").glob(f"step_{skipped[0]['step']}-rank?.safetensors"))) == 2
    assert len(skipped) == 1 and skipped[0]["grad_norm"] is None and named.startswith(f"step {skipped[0]['step']}:")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and lines[-1]["bad_steps"] == 1


def test_too_many_bad_steps_stop_the_run_with_a_checkpoint(toys, checkpoint_dir, tmp_path):
    args = str(checkpoint_dir), str(toys / "train.jsonl"), str(tmp_path / "o"), "record "
    with pytest.raises(AssertionError, match=r"2 steps in a row were not finite, or without targets\. Saved at step 2"):
        run_ranks(poisoned_run, 2, *args)
    assert (tmp_path / "o" / "checkpoints" / "step_2" / "state.json").is_file()
    assert not (tmp_path / "o" / "final").exists()


def test_adamw_on_own_rows_is_adamw_on_sharded_tensors():
    """To the bit: weights and moments after steps of changing learning rates, one of them skipped by the device."""
    mesh, kept = train.setup_distributed("cpu").mesh, []
    for kind in (torch.optim.AdamW, RowsAdamW):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])) for _ in range(2)]
        optimizer = kind(parameters, weight_decay=0.1, fused=True)
        for step in range(4):
            sum((p * torch.randn(())).pow(2).sum() for p in parameters).full_tensor().backward()
            update(optimizer, 0.1 / (1 + step), grad_clip=1.0, has_targets=torch.tensor(step != 2))
        kept.append([full(t) for p in parameters for t in (p, *optimizer.state[p].values())])
    assert len(kept[0]) == 8 and all(map(torch.equal, *kept))


@pytest.mark.parametrize(
    ("flags", "gathered"),
    [(["--lora_r", "0"], False), (["--lora_r", "0", "--mixed_precision", "bf16"], True), (["--lora_r", "4"], False)],
)
def test_alone_only_weights_of_another_dtype_are_gathered(flags, gathered, config):
    """On one rank, float32 weights that compute in float32 stay as they are: gathering would copy them twice in every step."""
    dist = train.setup_distributed("cpu")
    given = ["--train_manifest", "m", "--output_dir", "o", "--device", "cpu", "--mixed_precision", "no", *flags]
    model, _ = train.construct_model(train.parse_config(given), dist, config)
    assert {isinstance(p, DTensor) for p in model.parameters() if p.requires_grad} == {gathered}
