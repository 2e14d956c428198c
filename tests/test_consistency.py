"""The voice-consistency loss: who is compared with whom, its value and gradients, ranks, and a whole run."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_sample, run_ranks, write_manifest
from test_resume import settings

import loss
import metrics
import model_patch
import train
from collate import create_collator
from common import CollateError
from prepare.manifest import read_manifest
from tools import toys as demo

# ---- whose voice a clip is


def record(tmp_path, *turns, speaker: str | None = "ann"):
    """A record of ("user", "text") and ("assistant", None) turns, None being a clip; lists are several parts."""
    toys = demo.Toybox(tmp_path, seed=0)

    def part(value):
        return toys.say("abc", toys.house) if value is None else {"type": "text", "text": value}

    messages = [{"role": role, "content": [part(value) for value in values]} for role, *values in turns]
    named = {"speaker": speaker} if speaker else {}
    return read_manifest(write_manifest(tmp_path / "m.jsonl", [{"messages": messages} | named]))[0]


EXCHANGES = (
    *(("user", "[SPEAKER0] a"), ("assistant", None), ("user", "[SPEAKER1] b"), ("assistant", None)),
    *(("user", "[SPEAKER1] c"), ("assistant", None), ("user", "[SPEAKER0] d\n[SPEAKER1] e"), ("assistant", None)),
    *(("user", "f"), ("assistant", None)),
)
SCENE = ("system", "SPEAKER0: ", None, "\nSPEAKER1: ", None, "\n<|scene_desc_end|>")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "a"), ("assistant", None), ("user", "b"), ("assistant", "well", None)], ["ann", "ann"]),
        ([("system", "SPEAKER0: ", None, "."), ("user", "b"), ("assistant", None)], ["ann", "ann"]),
        (EXCHANGES, ["ann", "ann, SPEAKER1", "ann, SPEAKER1", None, None]),
        ([SCENE, ("user", "[SPEAKER1] b"), ("assistant", None)], ["ann", "ann, SPEAKER1", "ann, SPEAKER1"]),
        ([SCENE, ("user", "b"), ("assistant", None)], ["ann", "ann, SPEAKER1", None]),
    ],
)
def test_speakers_of_clips(turns, expected, tmp_path):
    assert record(tmp_path, *turns).speakers() == expected
    assert record(tmp_path, *turns, speaker=None).speakers() == [None] * len(expected)


# ---- which positions


CLONE = [("user", "ref"), ("assistant", 5), ("user", "new"), ("assistant", 7)]
SYSTEM = [("system", "voice: ", 6, "."), ("user", "speak"), ("assistant", 4), ("user", "more"), ("assistant", 3)]
PLAIN = [("user", "hello"), ("assistant", 9)]


def voiced(tokenizer, turns, *speakers, seed: int = 0, start_index: int | None = None):
    sample = make_sample(tokenizer, *turns, seed=seed, start_index=start_index)
    sample.speakers = speakers
    return sample


def test_a_clip_after_the_trained_audio_is_no_reference(config, tokenizer):
    """It could not have been read when the trained audio was generated."""
    turns = [("user", "ref"), ("assistant", 5), ("user", "new"), ("assistant", 7), ("user", 4)]
    sample = voiced(tokenizer, turns, "ann", "ann", "ann", start_index=3)
    voices = create_collator(config, with_voices=True)([sample]).voices
    assert (voices.reference_lengths, voices.trained_lengths) == ([14], [16])


def test_pairs_and_their_columns(config, tokenizer, tmp_path):
    """Clips of T frames take T + 9 columns. In the sorted positions text comes first, then input audio, then output audio."""
    samples = [
        voiced(tokenizer, CLONE, "ann", "ann", start_index=3),
        voiced(tokenizer, SYSTEM, "bob", "bob", "bob"),
        voiced(tokenizer, PLAIN, "cid"),  # no reference
        voiced(tokenizer, CLONE, "dan", None, start_index=3),  # nobody knows who speaks
        voiced(tokenizer, CLONE, "eva", "eva"),  # both are trained: no reference
        make_sample(tokenizer, *CLONE),
    ]
    batch = create_collator(config, with_voices=True)(samples)
    voices, out = batch.voices, batch.packing.layout.num_text + batch.audio_in_ids.shape[1]
    assert voices.speakers == ["ann", "bob"]
    assert (voices.reference_lengths, voices.trained_lengths) == ([14, 15], [16, 25])
    ann, bob = voices.reference.split(voices.reference_lengths)
    assert ann.tolist() == list(range(out, out + 14)) and bob.tolist() == list(range(batch.packing.layout.num_text, out))
    ann, bob = voices.trained.split(voices.trained_lengths)
    assert ann.tolist() == list(range(out + 14, out + 30)) and bob.tolist() == list(range(out + 30, out + 55))
    assert create_collator(config)(samples).voices is None
    metrics.write_dump(tmp_path, {"step": 1, "rank": 0}, [batch])
    assert metrics.read_dump(tmp_path / "step_1-rank0.safetensors")[1][0].voices is None, "others' voices are not kept either"
    nobody = create_collator(config, with_voices=True)(samples[2:3]).voices
    assert nobody.speakers == [] and nobody.reference.tolist() == nobody.trained.tolist() == []


# ---- the value


def slow_consistency(spoken, heard, speakers, first: int) -> float:
    """The definition, one pair at a time."""
    total = 0.0
    for index, voice in enumerate(spoken, start=first):
        scores = [
            torch.dot(voice, other).item() / (voice.norm() * other.norm()).item() / loss.VOICE_TEMPERATURE for other in heard
        ]
        rivals = [score for score, name in zip(scores, speakers) if name != speakers[index]]
        total -= math.log(math.exp(scores[index]) / sum(map(math.exp, [scores[index], *rivals])))
    return total


def test_the_value_equals_the_slow_reference():
    """float32 against float64; measured within 4e-8 relative. Two samples of one speaker are no rivals of each other."""
    torch.manual_seed(0)
    spoken, heard = torch.randn(3, 16), torch.randn(6, 16)
    speakers = ["ann", "bob", "ann", "cid", "bob", "dan"]
    found = loss.consistency_tally(spoken, heard, speakers, first=2)
    expected = slow_consistency(spoken.double(), heard.double(), speakers, first=2)
    assert [found.nats.item(), found.targets.item()] == pytest.approx([expected, 3], rel=1e-5)


def test_equal_voices_give_the_minimum_and_permuted_ones_more():
    torch.manual_seed(0)
    voices, speakers = torch.randn(4, 32), ["ann", "bob", "cid", "dan"]
    values = {
        order: loss.consistency_tally(voices[list(order)], voices, speakers).nats.item()
        for order in itertools.permutations(range(4))
    }
    same = values.pop((0, 1, 2, 3))
    assert same < 0.1 and min(values.values()) > same + 1
    orthogonal = loss.consistency_tally(torch.eye(4), torch.eye(4), speakers).nats.item()
    expected = 4 * math.log(1 + 3 * math.exp(-1 / loss.VOICE_TEMPERATURE))
    assert orthogonal == pytest.approx(expected, abs=1e-6)  # measured 2.3e-7: a small difference of larger numbers


@pytest.mark.parametrize("speakers", [[], ["ann"], ["ann", "ann"]])
def test_fewer_than_two_speakers_give_exactly_zero(speakers):
    spoken = torch.randn(len(speakers), 8, requires_grad=True)
    found = loss.consistency_tally(spoken, torch.randn(len(speakers), 8), speakers)
    assert (found.nats, found.targets) == (0, 0) and loss.num_comparable(speakers) == 0


def clones(tokenizer, *names: str | None):
    """A clone of each name, from an exchange and from the system turn in turns; of None one whose speaker nobody knows."""
    shapes, starts = (CLONE, SYSTEM), (3, None)
    return [
        voiced(tokenizer, shapes[i % 2], name, name, name, seed=i, start_index=starts[i % 2]) for i, name in enumerate(names)
    ]


def test_gradients_reach_trained_audio_alone(config, tokenizer):
    """Hidden states of what is spoken get a gradient in every column; references, text and other audio exactly none."""
    samples = [*clones(tokenizer, "ann", "bob"), voiced(tokenizer, PLAIN, "cid")]
    batch = create_collator(config, with_voices=True)(samples)
    torch.manual_seed(0)
    hidden = torch.randn(batch.packing.num_positions, 16, requires_grad=True)
    spoken, heard = loss.pool_voices(lambda rows: hidden.index_select(0, rows), batch.voices)
    assert not heard.requires_grad
    for pair, where in enumerate(batch.voices.trained.split(batch.voices.trained_lengths)):
        torch.testing.assert_close(spoken[pair], hidden[where].mean(0))
    loss.consistency_tally(spoken, heard, batch.voices.speakers).nats.backward()
    reached = hidden.grad.abs().sum(1)
    is_spoken = torch.zeros(len(hidden), dtype=torch.bool).index_fill(0, batch.voices.trained, True)
    assert (reached[is_spoken] > 0).all() and (reached[~is_spoken] == 0).all()


# ---- ranks


def voice_step(dist, groups: list[list[str | None]], weight: float) -> tuple[dict, dict, float]:
    """What is logged of an evaluation and of one step over micro-batches of `clones`, and the gradient norm."""
    tokenizer = demo.make_tokenizer()
    config = demo.tiny_config(tokenizer)
    model = model_patch.patch_for_training(make_model(config)).train()
    model_patch.shard(model, dist.mesh, torch.float32)
    argv = ["--train_manifest", "m", "--output_dir", "o", "--consistency_loss_weight", str(weight)]
    objective, labels = train.build_objective(train.parse_config(argv), config), loss.LabelSpec.of(config)
    collator = create_collator(config, with_voices=weight > 0)
    samples = iter(clones(tokenizer, *itertools.chain.from_iterable(groups)))
    batches = [collator([next(samples) for _ in names]) for names in groups]
    mine = batches[dist.rank :: dist.world_size]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    loader = SimpleNamespace(epoch=lambda position: [((batch,), None) for batch in mine])
    task = train.Task(model, optimizer, objective, labels, dist, grad_clip=0.0)
    evaluated = train.evaluate(task, loader)
    result = train.train_step(task, mine, step=0, lr=1e-3)
    return evaluated, objective.metrics(result.total.losses), result.total.grad_norm


def with_and_without(dist, cases):
    return [(voice_step(dist, groups, 0.5), voice_step(dist, groups, 0.0)) for groups in cases]


@pytest.mark.parametrize(
    "groups",
    [
        [["ann", "bob", "cid"], ["ann", "dan"]],  # unequally many, and one speaker on both ranks
        [["ann", "bob"], [None, None]],  # one rank has no pair
        [["ann"], ["bob"], [None], ["cid", "dan"]],  # neither has a rival of its own at first; accumulation
    ],
)
def test_two_ranks_equal_one(groups):
    """A micro-batch on each of two ranks gives what their samples give as one micro-batch on one rank.

    float32, measured: losses and the gradient norm within 2.7e-7 relative.
    """
    together = [first + second for first, second in zip(groups[::2], groups[1::2])]
    ((*expected, norm),) = run_ranks(voice_step, 1, together, 2.0)
    for values in expected:
        others = values["text_loss"] + values["audio_loss"]
        assert values["consistency_loss"] > 0.3
        assert values["loss"] == pytest.approx(others + 2.0 * values["consistency_loss"], rel=1e-5)
    for *found, found_norm in run_ranks(voice_step, 2, groups, 2.0):
        for values, expected_values in zip(found, expected):
            for name in ("loss", "consistency_loss"):
                assert values[name] == pytest.approx(expected_values[name], rel=1e-5)
        assert found_norm == pytest.approx(norm, rel=1e-5)


def test_steps_without_rivals_are_those_without_the_loss():
    """Nobody to compare on any rank, or everyone the same speaker: exactly the step without; where it is off, no key either."""
    cases = [[["ann"], ["ann"]], [[None], [None]], [["ann"], [None]]]
    for steps in run_ranks(with_and_without, 2, cases):
        for on, off in steps:
            assert on[0].pop("consistency_loss") == on[1].pop("consistency_loss") == 0
            assert on[0].pop("consistency_accuracy") is on[1].pop("consistency_accuracy") is None
            assert on == off


# ---- a run


def test_a_run_logs_it(toys, tmp_path):
    """From a manifest to metrics.jsonl, of a step and an evaluation."""
    val = toys / "few.jsonl"
    val.write_text("".join((toys / "val.jsonl").read_text().splitlines(keepends=True)[:8]))
    extra = {"consistency_loss_weight": 1.0, "max_steps": 1, "batch_size": 4, "val_manifest": val}
    assert train.main(settings(toys, tmp_path, 0, **extra)) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train", "val"]
    for line in lines:
        assert 0 < line["consistency_loss"] == pytest.approx(line["loss"] - line["text_loss"] - line["audio_loss"], abs=1e-4)


def test_what_cannot_be_compared_is_refused(config, tokenizer, toys, tmp_path, capsys):
    """A checkpoint that does not read reference codes; a manifest without references, or without speakers' names."""
    deaf = demo.tiny_config(tokenizer, encode_audio_in_tokens=False)
    with pytest.raises(CollateError, match="leave out --consistency_loss_weight"):
        create_collator(deaf, with_voices=True)
    records = [json.loads(line) for line in (toys / "train.jsonl").read_text().splitlines()]
    unpaired = [record for record in records if record["misc"]["kind"] == "no reference"]
    unnamed = [{name: value for name, value in record.items() if name != "speaker"} for record in records]
    for number, kept in enumerate((unpaired, unnamed)):
        manifest = write_manifest(toys / f"not-comparable-{number}.jsonl", kept)
        argv = settings(toys, tmp_path / str(number), 0, train_manifest=manifest, consistency_loss_weight=1.0)
        assert train.main(argv) == 2
        assert "no record to train on has both a `speaker` and a reference clip" in capsys.readouterr().err
