"""Finished models: adapters, merging, averaging, training states, model cards, and the official serve engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from conftest import ONLY_STEPS, ROOT, make_model, run_ranks
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_codec import write_wav

import checkpoint
import model_patch
import train
from common import CheckpointError
from config import AUDIO_TOKENIZER, BASE_CKPT, REVISIONS, Config, parse_config, to_argv
from export import card, merge, parity, pretrained, read, write
from export.__main__ import main as export_main
from export.final import write_final
from generate import __main__ as generate
from generate.serve import HiggsAudioServeEngine
from layers.adapters import init_lora
from tools import toys as demo


def settings(toys: Path, output_dir: Path, **extra) -> list[str]:
    values = ONLY_STEPS | {
        "train_manifest": toys / "train.jsonl",
        "base_ckpt": toys / "checkpoint",
        "output_dir": output_dir,
        "batch_size": 8,
        "num_workers": 0,
        "max_steps": 4,
        "lr": 5e-3,
        "mixed_precision": "no",
        "save_steps": 2,
        "device": "cpu",
    }
    return to_argv(values | extra)


def run(argv: list[str]) -> None:
    """A whole run in this process."""
    cfg = parse_config(argv)
    train.train(cfg, train.setup_distributed(cfg.device))


@pytest.fixture(scope="module")
def toys(toys, tmp_path_factory) -> Path:
    """The demo folder, with a checkpoint that does not stop speaking: the codec wants more than a frame or two."""
    folder = tmp_path_factory.mktemp("talkative") / "toys"
    shutil.copytree(toys, folder)
    path = folder / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    head = tensors["audio_decoder_proj.audio_lm_head.weight"]
    head.view(8, 66, -1)[:, 65] = 0  # the logit of end-of-stream is 0, and the largest of 64 others is above
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def lora_run(toys, tmp_path_factory) -> Path:
    """OUTPUT of a short LoRA run with validation; final/merged is written too."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    run(settings(toys, output, lora_r=4, merge_lora="True", val_manifest=toys / "val.jsonl", val_steps=2))
    return output


@pytest.fixture(scope="module")
def full_run(toys, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "full"
    run(settings(toys, output, lora_r=0, keep_last=0, lr=1e-4))
    return output


@pytest.fixture(scope="module")
def untrained(toys, tmp_path_factory) -> Path:
    """An adapter as training would start with it."""
    folder = tmp_path_factory.mktemp("untrained") / "adapter"
    base = read.Full(toys / "checkpoint")
    model = make_model(base.config)
    lora = model_patch.add_lora(model, 4, 8.0, 0.0)
    init_lora(model, seed=0)
    named = ((read.adapter_name(n), p.data) for n, p in model.named_parameters() if pretrained.is_lora(n))
    write.write_adapter(folder, named, lora, base.tokenizer)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(mine: dict, theirs: dict) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def command(capsys, *argv) -> str:
    """A command of launch.sh; returns what it printed."""
    assert export_main([*map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error(capsys, *argv) -> str:
    assert export_main([*map(str, argv)]) == 2
    return capsys.readouterr().err


# ---- adapters


def test_merging_is_exact_and_reported(lora_run, toys, tmp_path, capsys):
    """Measured: merged float32 differs from PEFT's adapter by 4e-7 where the adapter changes logits by 2; bfloat16, merged or not, by 9e-3."""
    out = command(capsys, "merge", lora_run / "final", tmp_path / "m", "--manifest", toys / "test.jsonl", "--records", 2)
    adapter, base = read.open_model(lora_run / "final"), read.Full(toys / "checkpoint")
    alone, merged, rounded, merged_rounded = parity.compare(adapter, base, toys / "test.jsonl", 2, Config.audio_tokenizer).rows
    assert all(str(row) in out for row in (alone, merged, rounded, merged_rounded))
    assert merged.largest < 3e-6 and (merged.same_text, merged.same_audio, merged.same_codes) == (1, 1, 1)
    assert alone.largest > 0.1 and alone.same_codes < 0.5, "the adapter has no effect that merging could lose"
    assert merged_rounded.largest < min(2 * rounded.largest, 0.1 * alone.largest)
    assert same(weights(tmp_path / "m"), weights(lora_run / "final" / "merged"))
    readme = (tmp_path / "m" / "README.md").read_text()
    assert "same codes" in readme and "bash launch.sh merge" in readme and "validation loss" in readme

    loaded = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(toys / "checkpoint"), lora_run / "final")
    theirs = loaded.merge_and_unload().state_dict()
    mine = weights(tmp_path / "m")
    assert mine.keys() == theirs.keys()
    assert max((mine[n] - theirs[n]).abs().max().item() for n in mine) < 1e-6  # measured 0


def test_a_lora_run_is_exported_as_adapter_or_merged(lora_run, tmp_path, capsys):
    """Without a layout the adapter alone, with one a whole model; which of the two is said."""
    model = read.find_model(lora_run)[0]
    out = command(capsys, "export", lora_run, tmp_path / "adapter")
    assert "is a LoRA adapter, which needs" in out and (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert same(weights(tmp_path / "adapter"), {n: read.open_model(model).read(n) for n in weights(tmp_path / "adapter")})
    for layout in ("boson", "transformers"):
        out = command(capsys, "export", lora_run, tmp_path / layout, "--layout", layout)
        assert "the adapter is merged into" in out and "the adapter changes its layers by" in out
    command(capsys, "merge", model, tmp_path / "merged")
    assert same(weights(tmp_path / "boson"), weights(tmp_path / "merged"))
    back = {read.layouts.rename(name, "boson"): tensor for name, tensor in weights(tmp_path / "transformers").items()}
    assert same(back, weights(tmp_path / "merged"))


def test_merging_rounds_once(lora_run, toys, tmp_path):
    """Into a bfloat16 base: the float32 sum, rounded; what rounding costs is reported."""
    base = tmp_path / "base"
    HiggsAudioModel.from_pretrained(toys / "checkpoint").bfloat16().save_pretrained(base)
    demo.make_tokenizer().save_pretrained(base)
    adapter = read.open_model(lora_run / "final")
    report = merge.merge(adapter, read.Full(base), tmp_path / "m")
    before, after, factors = weights(base), weights(tmp_path / "m"), weights(lora_run / "final")
    for module in adapter.modules:
        A, B = (factors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        expected = (before[f"{module}.weight"].float() + adapter.scale * (B @ A)).bfloat16()
        assert torch.equal(after[f"{module}.weight"], expected)
    others = before.keys() - {f"{module}.weight" for module in adapter.modules}
    assert all(torch.equal(after[name], before[name]) for name in others)
    assert 0 < max(report.rounding.values()) < 0.1 and "rounding to bfloat16 adds an error of" in str(report)


def test_an_untrained_adapter_is_reported(untrained, toys, tmp_path, capsys):
    out = command(capsys, "merge", untrained, toys / "checkpoint", tmp_path / "m")
    assert out.startswith("warning: the adapter has no effect: it changes none of its 30 layers")
    assert same(weights(tmp_path / "m"), weights(toys / "checkpoint"))
    assert "no effect" in (tmp_path / "m" / "README.md").read_text()


def test_training_reports_the_adapter(toys, tmp_path, capsys):
    """At the first evaluation after a step, and at the end; an adapter that cannot learn is named as what it is."""
    run(settings(toys, tmp_path / "o", lora_r=4, max_steps=2, lr=1e-30, val_manifest=toys / "val.jsonl", val_steps=1))
    assert capsys.readouterr().err.count("warning: the adapter has no effect") == 2


def _two_ranks(dist, argv: list[str], blocked: str):
    """The changes that a sharded model reports, and what all ranks hear if final/ cannot be written."""
    cfg = parse_config(argv)
    base = read.Full(Path(cfg.base_ckpt))
    model, lora = train.build_model(cfg, dist, base.config, base.folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            parameter.data.copy_(parameter.data + 0.01)
    changes = merge.relative_changes(model)
    write_final(Path(cfg.output_dir), model, base.config, base.tokenizer, lora, base.folder, merge_lora=True)
    try:
        write_final(Path(blocked), model, base.config, base.tokenizer, lora, base.folder)
        return changes, None
    except CheckpointError as caught:
        return changes, str(caught)


def test_two_ranks_report_and_fail_together(lora_run, toys, tmp_path):
    """Relative changes from sharded factors equal those of the merge; a full disk is one error on every rank."""
    for folder in (tmp_path / "o", tmp_path / "blocked"):
        folder.mkdir()
        for name in ("config.json", "metrics.jsonl"):
            (folder / name).write_text((lora_run / name).read_text())
    (tmp_path / "blocked" / ".final.tmp").write_text("in the way")
    argv = settings(toys, tmp_path / "o", lora_r=4)
    (mine, failure), (theirs, other_failure) = run_ranks(_two_ranks, 2, argv, str(tmp_path / "blocked"))
    assert mine == theirs and failure == other_failure and "final: cannot be written" in failure
    adapter, base = read.open_model(tmp_path / "o" / "final"), read.Full(toys / "checkpoint")
    report = merge.merge(adapter, base, tmp_path / "m")
    assert mine.keys() == report.changes.keys()
    assert mine == pytest.approx(report.changes, rel=1e-5)  # measured 3.3e-6
    assert same(weights(tmp_path / "o" / "final" / "merged"), weights(tmp_path / "m"))


# ---- training states, averaging


@pytest.mark.parametrize("kind", ["lora_run", "full_run"])
def test_a_training_state_becomes_a_model(kind, request, tmp_path, capsys):
    """The last state gives exactly what the run itself wrote; an earlier one something else, with a card of its own."""
    output = request.getfixturevalue(kind)
    for step in (2, 4):
        command(capsys, "export", output / "checkpoints" / f"step_{step}", tmp_path / str(step))
    assert same(weights(tmp_path / "4"), weights(output / "final"))
    assert not same(weights(tmp_path / "2"), weights(output / "final"))
    assert "| steps | 2 |" in (tmp_path / "2" / "README.md").read_text()
    if kind == "lora_run":
        mine, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path / "4", output / "final"))
        assert {n: sorted(v) if isinstance(v, list) else v for n, v in mine.items()} == {
            n: sorted(v) if isinstance(v, list) else v for n, v in theirs.items()
        }


def note_best(run: Path, step: int, **settings) -> None:
    """Let the newest checkpoint of a run say which step was the best."""
    path = run / "checkpoints" / "step_4" / "state.json"
    state = json.loads(path.read_text())
    state |= {"best": {"metric": "loss", "value": 1.25, "step": step}, "settings": state["settings"] | settings}
    path.write_text(json.dumps(state | {"sha256": checkpoint._checksum(state)}))


def test_a_run_stands_for_its_model(full_run, tmp_path, capsys):
    """The best step's checkpoint, else final/, else the newest whole checkpoint; which one is said, and the others are named."""
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    out = command(capsys, "export", run, tmp_path / "final")
    others = "others, which can be named instead: checkpoints/step_2, checkpoints/step_4"
    assert f"{run} is a run; its model is {run / 'final'} (no step is known as the best); {others}" in out
    assert same(weights(tmp_path / "final"), weights(full_run / "final"))
    note_best(run, 2)
    out = command(capsys, "export", run, tmp_path / "best")
    assert f"its model is {run / 'checkpoints' / 'step_2'} (the best by loss, 1.25 at step 2)" in out
    assert "others, which can be named instead: final, checkpoints/step_4" in out and out.splitlines()[0] in command(
        capsys, "show", run
    )
    command(capsys, "export", run / "checkpoints" / "step_2", tmp_path / "2")
    assert same(weights(tmp_path / "best"), weights(tmp_path / "2"))
    (run / "checkpoints" / "step_2" / "state.json").unlink()
    assert f"{run / 'final'} (the best by loss, 1.25 at step 2 has no whole checkpoint)" in command(capsys, "show", run)


def test_final_is_the_best_only_if_it_is_its_step(full_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    for step, kept, is_final in ((4, "last", True), (2, "best", True), (2, "last", False)):
        note_best(run, step, final=kept)
        (run / "final").touch()
        assert read.find_model(run)[0] == (run / "final" if is_final else run / "checkpoints" / f"step_{step}")
    note_best(run, 4)
    os.utime(run / "final", (0, 0))  # the run was continued after final/ was written
    assert read.find_model(run)[0] == run / "checkpoints" / "step_4"


def test_a_run_that_was_cut_short(full_run, tmp_path, capsys):
    """Without final/, the newest checkpoint that is whole; a damaged one is passed over."""
    run = tmp_path / "run"
    shutil.copytree(full_run, run, ignore=shutil.ignore_patterns("final"))
    assert f"its model is {run / 'checkpoints' / 'step_4'} (no step" in command(capsys, "export", run, tmp_path / "newest")
    assert same(weights(tmp_path / "newest"), weights(full_run / "final"))
    (shard,) = (run / "checkpoints" / "step_4").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"its model is {run / 'checkpoints' / 'step_2'} (no step" in command(capsys, "show", run)
    shutil.rmtree(run / "checkpoints")
    assert "has neither final/ nor a whole checkpoint" in error(capsys, "export", run, tmp_path / "m")
    assert "not finished; checkpoints: none" in command(capsys, "show", run)


def test_a_card_that_fails_costs_nothing(lora_run, toys, tmp_path, capsys):
    """Figures of another version in metrics.jsonl: the weights are there, and a warning."""
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    assert export_main(["export", str(run / "checkpoints" / "step_4"), str(tmp_path / "m")]) == 0
    assert "warning" in capsys.readouterr().err
    assert same(weights(tmp_path / "m"), weights(lora_run / "final"))


def test_old_spellings_name_the_new_ones(lora_run, capsys):
    for words in ("merge a b c", "export a b", "average a b", "show a"):
        assert checkpoint.main(words.split()) == 2
        assert f"is now: bash launch.sh {words.split()[0]}" in capsys.readouterr().err
    assert checkpoint.main([str(lora_run)]) == 0
    assert f"{lora_run / 'checkpoints' / 'step_4'}: whole" in capsys.readouterr().out


def test_average_is_the_mean(full_run, lora_run, toys, tmp_path, capsys):
    """Of full models, in float32 however they are stored; of training states, in float32 before rounding; of adapters."""
    folders = [full_run / "final", toys / "checkpoint"]
    command(capsys, "average", *folders, tmp_path / "full")
    parts = [weights(folder) for folder in folders]
    assert same(weights(tmp_path / "full"), {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})
    HiggsAudioModel.from_pretrained(tmp_path / "full")

    states = [full_run / "checkpoints" / f"step_{step}" for step in (2, 4)]
    command(capsys, "average", *states, tmp_path / "states")
    parts = [pretrained.Stored(state) for state in states]
    for name, mean in weights(tmp_path / "states").items():
        assert torch.equal(mean, sum(part.read(f"model.{name}") for part in parts) / 2)

    states = [lora_run / "checkpoints" / f"step_{step}" for step in (2, 4)]
    out = command(capsys, "average", *states, tmp_path / "adapter")
    assert "away from the mean of the changes" in out
    PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(toys / "checkpoint"), tmp_path / "adapter")


def test_an_average_of_strangers_is_noticed(lora_run, toys, tmp_path):
    """Adapters of separate runs agree in nothing: their factors' mean is far from the mean of what they add."""
    run(settings(toys, tmp_path / "o", lora_r=4, seed=5, max_steps=2, save_steps=0))
    strangers = [read.open_model(lora_run / "final"), read.open_model(tmp_path / "o" / "final")]
    report = merge.average(strangers, tmp_path / "mean")
    share = float(report.split("is ")[1].split("%")[0])
    states = [read.open_model(lora_run / "checkpoints" / f"step_{step}") for step in (2, 4)]
    close = float(merge.average(states, tmp_path / "close").split("is ")[1].split("%")[0])
    assert close < 5 < 20 < share  # measured 0.4 % and 68 %


# ---- the card


def test_the_card_says_how_to_make_it_again(lora_run):
    text = (lora_run / "final" / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("bash launch.sh train "))
    run = json.loads((lora_run / "config.json").read_text())
    again = parse_config(shlex.split(line)[3:])
    assert all(card.public(run[name]) == value for name, value in vars(again).items())
    assert str(lora_run.parent) not in text and run["base_ckpt"] not in text, "what may become public names no folders"
    values = [json.loads(line) for line in (lora_run / "metrics.jsonl").read_text().splitlines()]
    val = [line for line in values if line["split"] == "val"][-1]
    assert f"| validation loss | {val['loss']:.4g} |" in text and "| records | 31 |" in text
    trained = [line for line in values if line["split"] == "train"]
    assert f"| audio targets | {sum(line['audio_targets'] for line in trained)} |" in text
    assert text.startswith("---\npipeline_tag: text-to-speech\n") and "library_name: peft" in text
    assert "base_model" not in text, "a local folder is no model of the Hub"


def test_the_card_of_an_earlier_step(lora_run, tmp_path, capsys):
    """Only what had happened by then counts; what was heard counts too, and a last line that was cut off does not."""
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    heard = [json.dumps({"split": "sample", "step": step, "epoch": 0, "stop_rate": step / 8}) for step in (1, 3)]
    (run / "metrics.jsonl").write_text("\n".join([*heard, (run / "metrics.jsonl").read_text()]) + '{"split": "tra')
    command(capsys, "export", run / "checkpoints" / "step_2", tmp_path / "2")
    text = (tmp_path / "2" / "README.md").read_text()
    assert "| steps | 2 |" in text and "| validation step | 2 |" in text and "| samples: stop_rate | 0.125 |" in text


# ---- the official engine


GREEDY = ["--temperature", "0", "--ras_win_len", "0", "--max_new_tokens", "24", "--force_audio", "--normalize", "no"]


@pytest.mark.parametrize("kind", ["full_run", "lora_run"])
def test_the_serve_engine_says_what_generate_says(kind, request, codec_dir, tmp_path, capsys):
    """An exported run in the official engine, with a reference clip and the official codec class (random weights): the codes
    of `generate`, and sound."""
    command(capsys, "export", request.getfixturevalue(kind), tmp_path / "voice", "--layout", "boson")
    write_wav(tmp_path / "reference.wav", 0.4)
    clip = AudioContent(audio_url=str(tmp_path / "reference.wav"))
    chat = ChatMLSample([Message("user", "what it says"), Message("assistant", clip), Message("user", "hello there")])
    engine = HiggsAudioServeEngine(str(tmp_path / "voice"), str(codec_dir), device="cpu", kv_cache_lengths=[128, 256])
    answer = engine.generate(chat, max_new_tokens=24, temperature=0.0, force_audio_gen=True, ras_win_len=None)
    num_columns = answer.generated_audio_tokens.shape[1]
    assert num_columns > 10 and answer.audio.shape == ((num_columns - 7 - 2) * 960,) and abs(answer.audio).max() > 0
    asked = [
        "--ckpt",
        tmp_path / "voice",
        "--text",
        "hello there",
        "--ref_audio",
        tmp_path / "reference.wav",
        "--ref_text",
        "what it says",
    ]
    out = tmp_path / "answer.npy"
    assert (
        generate.main([*map(str, asked), *GREEDY, "--audio_tokenizer", str(codec_dir), "--device", "cpu", "--out", str(out)])
        == 0
    )
    delayed = answer.generated_audio_tokens
    codes = np.stack([delayed[k, k : num_columns - 7 + k] for k in range(8)]).clip(0, 63)[:, 1:-1]
    assert np.array_equal(np.load(out), codes)


# ---- what the card says


def snippets(folder: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


@pytest.fixture()
def desk(tmp_path, codec_files, monkeypatch) -> Path:
    """The current folder, with a reference clip; the codec is in the Hub's cache, there is no network."""
    cache = tmp_path / "hub"
    for name, revision in REVISIONS.items():
        if name in (AUDIO_TOKENIZER, "bosonai/hubert_base"):
            source = codec_files if name == AUDIO_TOKENIZER else codec_files / name
            (cache / f"models--{name.replace('/', '--')}" / "snapshots").mkdir(parents=True)
            (cache / f"models--{name.replace('/', '--')}" / "snapshots" / revision).symlink_to(source)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bosonai").symlink_to(codec_files / "bosonai")
    write_wav(tmp_path / "reference.wav", 0.4)
    (tmp_path / "reference.txt").write_text("what it says")
    return tmp_path


def engine_snippet(folder: Path) -> str:
    (code,) = snippets(folder, "python")
    assert "max_new_tokens=1024" in code
    return code.replace("max_new_tokens=1024", "max_new_tokens=24")


def test_the_snippets_of_a_card_run(full_run, desk, capsys):
    """As they stand, but with fewer tokens: the official engine, and this trainer's commands."""
    command(capsys, "export", full_run, "voice")
    exec(engine_snippet(desk / "voice"), {})
    assert soundfile.info("answer.wav").frames >= 960
    Path("answer.wav").unlink()
    speak, export = snippets(desk / "voice", "bash")[0].splitlines()
    assert generate.main([*shlex.split(speak)[3:], "--max_new_tokens", "24", "--force_audio", "--device", "cpu"]) == 0
    assert soundfile.info("answer.wav").frames >= 960
    command(capsys, *shlex.split(export)[2:])
    assert (desk / "other" / "processor_config.json").is_file()


@pytest.mark.slow
def test_the_official_engine_in_a_process_of_its_own(full_run, desk, capsys):
    """What docs/card.md says of this trainer's environment: after `import generate.serve` the snippet runs."""
    command(capsys, "export", full_run, "voice")
    code = f"import generate.serve\n{engine_snippet(desk / 'voice')}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": huggingface_hub.constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert soundfile.info("answer.wav").frames >= 960


def test_the_card_of_an_adapter(lora_run, toys, desk, monkeypatch, capsys):
    """Its snippet loads it with PEFT: the very logits of the merged model."""
    command(capsys, "export", lora_run, "adapter")
    (desk / "checkpoint").symlink_to(toys / "checkpoint")
    (code,) = snippets(desk / "adapter", "python")
    made: dict = {}
    exec(code, made)
    layer = made["model"].base_model.model.layers[0].self_attn.q_proj
    assert torch.equal(
        layer.lora_B["default"].weight, weights(desk / "adapter")["base_model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    )
    assert "library_name: peft" in (desk / "adapter" / "README.md").read_text()


def test_a_card_with_everything(lora_run, desk, capsys):
    """Languages, samples up to the step, evaluations, the base's licence, and how it was made; no folder of this machine."""
    run = desk / "run"
    shutil.copytree(lora_run, run)
    for step in (2, 4):
        folder = run / "samples" / f"step_{step}"
        folder.mkdir(parents=True)
        write_wav(folder / "a.wav", 0.1 * step)
        lines = [{"text": "one\nline", "wav": "a.wav", "reference_wav": "../../reference.wav"}, {"text": "nothing was said"}]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluation").mkdir()
    figures = {"wer_seedtts": {"value": 0.05, "against": 0.1}, "rtf": {"value": None, "against": None}}
    found = {"models": [str(run / "final"), BASE_CKPT], "lines": str(desk / "test.jsonl"), "num_lines": 7, "figures": figures}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(found | {"judged_by": {"asr_model": "openai/whisper-tiny"}}))
    config = json.loads((run / "config.json").read_text()) | {
        "base_ckpt": BASE_CKPT,
        "train_manifest": f"{desk}/a.jsonl:2,{desk}/b.jsonl",
    }
    (run / "config.json").write_text(json.dumps(config))
    named = json.loads((run / "final" / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE_CKPT}
    (run / "final" / "adapter_config.json").write_text(json.dumps(named))
    command(capsys, "export", run / "final", "all", "--samples", "--language", "en", "de")
    text = (desk / "all" / "README.md").read_text()
    for part in ("language: [en, de]", f"base_model: {BASE_CKPT}", "license: other", "## Samples of step 4", "| one line |"):
        assert part in text
    assert "Boson Higgs Audio 2 Community License" in text and "| manifest | a.jsonl:2,b.jsonl |" in text
    assert (
        "| lines | 7 of test.jsonl |" in text and "| wer_seedtts | 0.05, against 0.1 |" in text and "against bosonai/" in text
    )
    assert [path.name for path in (desk / "all" / "samples").iterdir()] == ["0.wav"]
    assert str(desk) not in text and str(lora_run.parent) not in text
    command(capsys, "export", "all", "again")
    again = (desk / "again" / "README.md").read_text()
    assert again.count("## How it was made") == again.count("## How to use") == 1 and "Samples" not in again
    assert text[text.index("## How it was made") :] == again[again.index("## How it was made") :]


# ---- mistakes


def test_mistakes(lora_run, full_run, untrained, toys, tmp_path, capsys):
    base = toys / "checkpoint"
    assert "exists already" in error(capsys, "merge", untrained, base, lora_run)
    assert "is not an adapter" in error(capsys, "merge", base, base, tmp_path / "m")
    for words in (("merge", untrained, tmp_path / "m"), ("export", untrained, tmp_path / "m", "--layout", "transformers")):
        remedy = f"{untrained} does not name its base: bash launch.sh merge {untrained} BASE {tmp_path / 'm'}"
        assert remedy in error(capsys, *words)
    assert "are not alike" in error(capsys, "average", base, untrained, tmp_path / "m")
    assert "no config.json" in error(capsys, "show", tmp_path)
    assert "neither a folder nor" in error(capsys, "merge", untrained, tmp_path / "no" / "such" / "base", tmp_path / "m")

    text = {**demo.tiny_config(demo.make_tokenizer()).text_config.to_dict(), "intermediate_size": 64}
    wide = demo.make_checkpoint(tmp_path / "wide", text_config=text, audio_embed_avg=True)
    assert "is made for layers.0.audio_mlp" in error(capsys, "merge", untrained, wide, tmp_path / "m")
    assert "averaged audio embeddings" in error(capsys, "export", wide, tmp_path / "m", "--layout", "transformers")

    special = tmp_path / "special"
    special.mkdir()
    values = json.loads((untrained / "adapter_config.json").read_text())
    save_file(weights(untrained), special / "adapter_model.safetensors")
    (special / "adapter_config.json").write_text(json.dumps(values | {"lora_bias": True}))
    assert "not a plain LoRA adapter (lora_bias)" in error(capsys, "merge", special, base, tmp_path / "m")
    (special / "adapter_config.json").write_text("{}")
    assert "is not a LoRA adapter's" in error(capsys, "merge", special, base, tmp_path / "m")

    assert not (tmp_path / "m").exists()


def test_what_a_folder_holds(lora_run, toys, capsys):
    assert "a run, finished: final; checkpoints: step_2, step_4" in command(capsys, "show", lora_run)
    assert "a LoRA adapter, r=4" in command(capsys, "show", lora_run / "final")
    assert '"step": 4' in command(capsys, "show", lora_run / "checkpoints" / "step_4")
    assert "boson layout" in command(capsys, "show", toys / "checkpoint")


# ---- starting from an adapter


def test_lora_starts_from_an_earlier_adapter(lora_run, toys, tmp_path, capsys):
    """At a learning rate that changes nothing, the run's adapter is the earlier one, bit for bit; checkpoints note it."""
    again = {"lora_r": 4, "max_steps": 2, "lr": 1e-30, "save_steps": 1}
    run(settings(toys, tmp_path / "o", init_adapter=lora_run, **again))
    model = read.find_model(lora_run)[0]
    first = read.open_model(model)
    assert same(weights(tmp_path / "o" / "final"), {name: first.read(name) for name in first.shapes})
    assert f"the adapter starts from {model.resolve()}, which was trained on {toys / 'checkpoint'}" in capsys.readouterr().err
    kept = checkpoint.read_state(tmp_path / "o" / "checkpoints" / "step_2")["started_from"]
    assert kept["folder"] == str(model.resolve()) and len(kept["sha256"]) == 64
    assert "| init_adapter | lora |" in (tmp_path / "o" / "final" / "README.md").read_text()
    shutil.rmtree(tmp_path / "o" / "final")
    run(settings(toys, tmp_path / "o", init_adapter=tmp_path / "moved", **again | {"max_steps": 3, "resume": "auto"}))
    assert checkpoint.read_state(tmp_path / "o" / "checkpoints" / "step_3")["started_from"] == kept


def test_an_adapter_that_a_run_cannot_start_from(lora_run, toys, tmp_path, capsys):
    def error(**extra) -> str:
        assert train.main(settings(toys, tmp_path / "o", **{"lora_r": 4, "init_adapter": lora_run} | extra)) == 2
        return capsys.readouterr().err

    assert "rank, alpha or kind is another than this run's; give --lora_r 4 --lora_alpha 32" in error(lora_r=8)
    assert "made for other layers: layers.0.audio_mlp." in error(lora_targets="self_attn")
    assert "not in this run; --lora_targets has to be the same" in error(lora_targets="self_attn")
    assert f"a full model; start from it with --base_ckpt {toys / 'checkpoint'}" in error(init_adapter=toys / "checkpoint")
    assert "--init_adapter: a full fine-tune has no adapter" in error(lora_r=0)
    assert "neither a folder nor a Hub repository" in error(init_adapter=tmp_path / "nothing")
