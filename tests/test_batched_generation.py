"""Generated together, every prompt gets token for token what the official generate() gives it alone.

float32 on a CPU. Logits of a batch differ from those of one prompt by rounding (measured: at most 4e-6), so a draw
within that of a threshold could differ: such near ties are counted and listed, and here there is none.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections import deque

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from conftest import make_model, make_sample, run_ranks

import model_patch
from common import CheckpointError, ConfigError
from generate import batched
from generate.batched import generate_many
from generate.models import load_model
from generate.official import Answer, Request, Sampling, as_prompt, generate_each, official_collator
from layers.nf4 import is_quantized
from tools import toys as demo

LONGEST = 48
GREEDY = Sampling(temperature=0, ras_win_len=0, max_new_tokens=LONGEST)
SAMPLINGS = {
    "greedy": GREEDY,
    "greedy, repetition-aware": Sampling(temperature=0, max_new_tokens=LONGEST),
    "official": Sampling(max_new_tokens=LONGEST),
    "hot": Sampling(1.0, top_k=0, top_p=1.0, ras_win_len=3, ras_win_max_num_repeat=1, max_new_tokens=LONGEST),
    "few": Sampling(1.3, top_k=5, top_p=0.5, max_new_tokens=LONGEST),
}


def phrasings(i: int) -> list[list[tuple]]:
    """Turns of every phrasing of the official inference, of lengths that depend on i."""
    text, scene = ("user", "say this" * (1 + i % 3)), "<|scene_desc_start|>\nA quiet room.\n<|scene_desc_end|>"
    speakers = ("system", "<|scene_desc_start|>\nSPEAKER0: ", 4 + i, "\nSPEAKER1: ", 7, "\n<|scene_desc_end|>")
    exchange = [("user", "reference"), ("assistant", 3 + 5 * i)]
    dialogue = [("user", "[SPEAKER0] ab"), ("assistant", 6), ("user", "[SPEAKER1] cd"), ("assistant", 2 + i)]
    return [
        [text],
        [("system", "Generate audio following instruction."), text],
        [("system", scene), text],
        [*exchange, text],
        [*dialogue, ("user", "[SPEAKER0] ef\n[SPEAKER1] gh")],
        [("system", "voice: ", 5 + i, "."), text],
        [speakers, ("user", "[SPEAKER0] ef\n[SPEAKER1] gh")],
        [("system", scene), *exchange, ("user", "first part"), ("assistant", 9 + i), text],
    ]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """32: four lengths of eight phrasings, half of which begin with audio."""
    turns = [(turns, i) for i in range(4) for turns in phrasings(i)]
    return [as_prompt(make_sample(tokenizer, *t, seed=n), tokenizer, n % 2 > 0) for n, (t, _) in enumerate(turns)]


def make_talkative(tokenizer, prompts) -> HiggsAudioModel:
    """A random model whose answers begin, end and begin again: those tokens' logits are raised along the mean hidden state."""
    model = make_model(demo.tiny_config(tokenizer))
    batch = official_collator(model.config)([dataclasses.replace(p, label_ids=None) for p in prompts[3:4]])
    with torch.no_grad():
        output = model(**vars(batch), output_hidden_states=True)
        heads, hidden = model.audio_decoder_proj, output.hidden_states[-1][0]
        for weight, ids, mean, height in (
            (heads.text_lm_head.weight, ["<|eot_id|>", "<|audio_out_bos|>"], hidden[~output.audio_out_mask[0]].mean(0), 7.0),
            (heads.audio_lm_head.weight, [65, 66 * 3 + 65], hidden[output.audio_out_mask[0]].mean(0), 3.0),
        ):
            for token in ids:
                row = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else token
                weight[row] += height * mean / mean.square().sum()
    return model


def make_adapted(model: HiggsAudioModel) -> HiggsAudioModel:
    """The same with PEFT layers that change something."""
    model = copy.deepcopy(model)
    model_patch.add_lora(model, r=4, alpha=8, dropout=0.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.eval()


def merged(model: HiggsAudioModel) -> HiggsAudioModel:
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    return model


@pytest.fixture(scope="module")
def models(tokenizer, prompts) -> dict[str, HiggsAudioModel]:
    full = make_talkative(tokenizer, prompts)
    adapted = make_adapted(full)
    return {"full": full, "adapter": adapted, "merged": merged(adapted)}


def requests_of(prompts) -> deque[Request]:
    """Each with a seed and a longest answer of its own."""
    return deque(Request(prompt, 100 + i, LONGEST - i % 5, i) for i, prompt in enumerate(prompts))


def one_by_one(model, tokenizer, prompts, sampling) -> list[Answer]:
    return [answer for _, answer in generate_each(model, tokenizer, requests_of(prompts), sampling)]


def together(model, tokenizer, prompts, sampling, size: int) -> list[Answer]:
    answers = {r.key: answer for r, answer in generate_many(model, tokenizer, requests_of(prompts), sampling, size)}
    return [answers[i] for i in range(len(prompts))]


def differing(some: list[Answer], others: list[Answer]) -> list[int]:
    """Which answers are not the same to the last token."""
    return [i for i, (one, other) in enumerate(zip(some, others, strict=True)) if parts(one) != parts(other)]


def parts(answer: Answer) -> tuple:
    return answer.token_ids, answer.stopped, *([clip.tolist() for clip in clips] for clips in (answer.delayed, answer.codes))


NEAR = 1e-5  # of logits, more than twice what rounding does


def watch_draws(monkeypatch) -> set[tuple[int, int]]:
    """(request, step) of each draw from now on that is within NEAR of a threshold.

    There something else is drawn if the logit of what was drawn falls by NEAR and all others rise by it.
    """
    near: set[tuple[int, int]] = set()
    draw = batched.Batch._draw

    def spy(batch, logits, rows):
        states = [row.generator.get_state() for row in rows]
        drawn = draw(batch, logits, rows)
        for row, state in zip(rows, states):
            row.generator.set_state(state)
        winner = drawn[..., None]
        moved = (logits + NEAR).scatter(-1, winner, logits.gather(-1, winner) - NEAR)
        differs = (draw(batch, moved, rows) != drawn).any(-1)
        near.update((row.request.key, row.num_steps) for row, differ in zip(rows, differs) if differ)
        return drawn

    monkeypatch.setattr(batched.Batch, "_draw", spy)
    return near


def steps_of(answer: Answer, tokenizer) -> list:
    """What each step of an answer gave: a token, or a column of codes, after a clip's last one with <|audio_eos|>."""
    clips, clip = iter(answer.delayed), tokenizer.convert_tokens_to_ids("<|AUDIO_OUT|>")
    steps = []
    for token, before in zip(answer.token_ids, [None, *answer.token_ids]):
        steps += next(clips).T.tolist() if token == clip else [token] * (before != clip)
    return steps


def split_differing(some: list[Answer], others: list[Answer], near: set, tokenizer) -> tuple[list[int], list[int]]:
    """(near ties, other differences): the answers whose first differing draw is one of `near`, and the rest that differ."""
    ties, faults = [], []
    for i in differing(some, others):
        pairs = zip(steps_of(some[i], tokenizer), steps_of(others[i], tokenizer))
        step = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
        (ties if (i, step) in near else faults).append(i)
    return ties, faults


RARE = {name: [pytest.mark.slow] for name in ("greedy, repetition-aware", "few")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=RARE.get(name, [])) for name in SAMPLINGS])
def test_equals_the_official_call(name, models, prompts, tokenizer, monkeypatch):
    """Any number of rows; and the answers do what answers can do, or this would show little."""
    expected = one_by_one(models["full"], tokenizer, prompts, SAMPLINGS[name])
    near = watch_draws(monkeypatch)
    for size in (1, 3, 16):
        found = together(models["full"], tokenizer, prompts, SAMPLINGS[name], size)
        ties, faults = split_differing(found, expected, near, tokenizer)
        print(f"{size} together: {len(ties)} near ties {ties}; {len(near)} steps had a draw within {NEAR} of a threshold")
        assert (ties, faults) == ([], [])
    assert len({len(answer.token_ids) for answer in expected}) > 1 and sum(len(a.codes) > 0 for a in expected) >= 16
    if name in ("official", "hot"):
        assert any(a.stopped for a in expected) and not all(a.stopped for a in expected)
        assert any(len(a.codes) > 1 for a in expected), "no answer has a second clip"


def test_near_ties_are_recognised(models, prompts, tokenizer, monkeypatch):
    """Logits off by at most NEAR, which is much here: some answers differ, each first at a draw that was listed."""
    sampling = Sampling(1.0, top_k=0, top_p=1.0, ras_win_len=0, max_new_tokens=LONGEST)
    expected = together(models["full"], tokenizer, prompts[:8], sampling, 8)
    heads, generator = batched._forward_heads, torch.Generator().manual_seed(0)
    monkeypatch.setitem(globals(), "NEAR", 0.05)
    near = watch_draws(monkeypatch)

    def rounded(*arguments) -> tuple[torch.Tensor, ...]:
        return tuple(x + NEAR * (2 * torch.rand(x.shape, generator=generator) - 1) for x in heads(*arguments))

    monkeypatch.setattr(batched, "_forward_heads", rounded)
    found = together(models["full"], tokenizer, prompts[:8], sampling, 8)
    ties, faults = split_differing(found, expected, near, tokenizer)
    assert ties and not faults
    assert split_differing(found, expected, set(), tokenizer) == ([], ties)


@pytest.mark.parametrize(
    "count, name", [(12, "official"), *(pytest.param(32, name, marks=pytest.mark.slow) for name in ("greedy", "official"))]
)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_adapters(kind, count, name, models, prompts, tokenizer):
    expected = one_by_one(models[kind], tokenizer, prompts[:count], SAMPLINGS[name])
    assert differing(together(models[kind], tokenizer, prompts[:count], SAMPLINGS[name], 8), expected) == []
    assert differing(one_by_one(models["full"], tokenizer, prompts[:4], SAMPLINGS[name]), expected[:4]), "it changes nothing"


def test_a_base_of_4_bits(models, prompts, tokenizer, tmp_path):
    pytest.importorskip("torchao", reason="needs requirements-nf4.txt")
    models["full"].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "", None, torch.float32, torch.device("cpu"), quantize=True)
    assert any(is_quantized(parameter) for parameter in model.parameters())
    expected = one_by_one(model, tokenizer, prompts[:6], SAMPLINGS["official"])
    assert differing(together(model, tokenizer, prompts[:6], SAMPLINGS["official"], 4), expected) == []


def test_a_model_patched_for_training(models, prompts, tokenizer):
    """As samples while training; afterwards the model is as it was."""
    model = model_patch.patch_for_training(copy.deepcopy(models["full"]))
    expected = one_by_one(models["full"], tokenizer, prompts[:8], SAMPLINGS["official"])
    assert differing(together(model, tokenizer, prompts[:8], SAMPLINGS["official"], 8), expected) == []
    assert not any("forward" in vars(module) for module in model.modules())
    assert differing(one_by_one(model, tokenizer, prompts[:8], SAMPLINGS["official"]), expected) == []


def test_neighbours_do_not_matter(models, prompts, tokenizer):
    """Another order gives other neighbours and other rows."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = deque(requests_of(prompts)[i] for i in order)
    found = {r.key: a for r, a in generate_many(models["full"], tokenizer, shuffled, SAMPLINGS["official"], 5)}
    expected = together(models["full"], tokenizer, prompts, SAMPLINGS["official"], 7)
    assert differing([found[i] for i in range(32)], expected) == []


def test_requests_may_be_added_between_answers(models, prompts, tokenizer):
    """Each answer is followed by a request of the same prompt with the next seed, as by a next chunk."""
    requests, found = requests_of(prompts[:6]), {}
    for request, answer in generate_many(models["full"], tokenizer, requests, SAMPLINGS["official"], 4):
        found[request.key] = answer
        if request.key < 6:
            requests.appendleft(Request(request.prompt, request.seed + 50, request.max_new_tokens, request.key + 6))
    assert len(found) == 12
    again = [Request(r.prompt, r.seed + 50, r.max_new_tokens) for r in requests_of(prompts[:6])]
    expected = deque([*requests_of(prompts[:6]), *again])
    expected = [answer for _, answer in generate_each(models["full"], tokenizer, expected, SAMPLINGS["official"])]
    assert differing([found[i] for i in range(12)], expected) == []


def sharded(dist, state: dict, prompts, sampling: Sampling) -> list[dict[int, tuple]]:
    """This rank's share of 6 prompts, then of 8, by a sharded model: rank 0 has many more than rank 1, which first has none."""
    tokenizer = demo.make_tokenizer()
    model = make_model(demo.tiny_config(tokenizer))
    model.load_state_dict(state)
    model = model_patch.patch_for_training(model)
    model_patch.shard(model, dist.mesh, param_dtype=torch.float32)
    shares = []
    for count in (6, 8):
        requests = list(requests_of(prompts[:count]))
        mine = deque(requests[:6] if dist.rank == 0 else requests[6:])
        answers = generate_many(model.eval(), tokenizer, mine, sampling, 4, dist.any)
        shares.append({request.key: parts(answer) for request, answer in answers})
    return shares


def test_sharded_ranks(models, prompts, tokenizer):
    """Two ranks with shares of different sizes, one perhaps with nothing to do, under FSDP2."""
    expected = [parts(answer) for answer in one_by_one(models["full"], tokenizer, prompts[:8], SAMPLINGS["official"])]
    first, second = run_ranks(sharded, 2, models["full"].state_dict(), prompts[:8], SAMPLINGS["official"])
    for mine, others, count in zip(first, second, (6, 8)):
        assert [len(mine), len(others)] == [6, count - 6]
        assert [(mine | others)[i] for i in range(count)] == expected[:count]


def test_the_cache_grows(models, tokenizer, monkeypatch):
    """A cache that has to grow within an answer holds what it held."""
    prompts = [as_prompt(make_sample(tokenizer, ("user", "a b c" * n), seed=n), tokenizer, True) for n in range(1, 4)]
    expected = together(models["full"], tokenizer, prompts, SAMPLINGS["official"], 3)
    monkeypatch.setattr(batched, "CACHE_STEP", 8)
    assert differing(together(models["full"], tokenizer, prompts, SAMPLINGS["official"], 3), expected) == []


@pytest.mark.parametrize(
    "backend, kind, step, num_graphs",
    [
        ("eager", "full", 256, 2),
        pytest.param("inductor", "full", 64, 4, marks=pytest.mark.slow),
        pytest.param("inductor", "adapter", 256, 2, marks=pytest.mark.slow),
    ],
)
def test_compiled(backend, kind, step, num_graphs, models, prompts, tokenizer, monkeypatch):
    """The same codes. A step is one graph, another one where some rows are text; and both again for a cache that has grown."""
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("inductor needs a C++ compiler")
    prompts = [prompts[i] for i in (0, 3, 5, 12)]
    expected = together(models[kind], tokenizer, prompts, SAMPLINGS["official"], 3)
    monkeypatch.setattr(batched, "COMPILE", {"backend": backend})
    monkeypatch.setattr(batched, "CACHE_STEP", step)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    found = generate_many(models[kind], tokenizer, requests_of(prompts), SAMPLINGS["official"], 3, compiled=True)
    found = {request.key: answer for request, answer in found}
    assert differing([found[i] for i in range(len(prompts))], expected) == []
    assert num_graphs <= graphs["unique_graphs"] <= num_graphs + (step < 256) * 2
    torch._dynamo.reset()


def test_a_machine_that_cannot_compile(models, prompts, tokenizer, monkeypatch):
    def without_a_compiler(*_):
        raise RuntimeError("no working compiler")

    monkeypatch.setattr(batched, "COMPILE", {"backend": without_a_compiler})
    requests = requests_of(prompts[:1])
    with pytest.raises(ConfigError, match="--compile: .*without_a_compiler.*; leave it out"):
        list(generate_many(models["full"], tokenizer, requests, SAMPLINGS["official"], 1, compiled=True))
    torch._dynamo.reset()


def test_errors(models, prompts, tokenizer):
    """A model it cannot run, and tokens that the tokenizer lacks, as the official call has it."""
    config = demo.tiny_config(tokenizer, audio_dual_ffn_layers=[0, 2])
    with pytest.raises(CheckpointError, match=r"cannot generate many prompts together.*--official"):
        next(generate_many(HiggsAudioModel(config), tokenizer, requests_of(prompts), GREEDY, 2))
    model = copy.deepcopy(models["full"])
    head = model.audio_decoder_proj.text_lm_head
    head.weight.data = torch.cat([head.weight.data, 100 * head.weight.data[:50]])
    for generate in (generate_each, lambda *a: generate_many(*a, 2)):
        with pytest.raises(ValueError, match="token"):
            list(generate(model, tokenizer, requests_of(prompts), Sampling(max_new_tokens=LONGEST)))


def test_rows_that_fit(models, monkeypatch):
    """Keys and values: 3 layers x 2 x 2 heads x 32 x 4 bytes a position, of half the free memory."""
    size = 3 * 2 * 2 * 32 * 4 * 1280  # capacity for 1024 + 100
    memory = type("Memory", (), {"available": size * 10 + 1000})()
    monkeypatch.setattr(batched.psutil, "virtual_memory", lambda: memory)
    assert batched.rows_that_fit(models["full"], 100) == 5
    assert batched.rows_that_fit(models["full"], 100, compiled=True) == 3, "a capacity of 2048"
    memory.available = 10
    assert batched.rows_that_fit(models["full"], 100) == 1
    memory.available = 1 << 50
    assert batched.rows_that_fit(models["full"], 100) == batched.MOST_ROWS["cpu"]
