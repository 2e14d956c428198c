"""Each file of recipes/ is read by the real parser and trains, at toy size; in one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import metrics

import train
from config import Config, parse_config, to_argv

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_six_recipes():
    assert [path.stem for path in RECIPES] == [
        *("full_8_gpus", "many_voices_lora", "new_language", "one_voice_lora", "small_card_nf4", "two_speaker_dialogues")
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, toys, tmp_path, monkeypatch):
    """As its first lines say, but for the folder: every setting is applied, and says why it is there."""
    lines = path.read_text().splitlines()
    (command,) = (line for line in lines if "bash launch.sh --config" in line)
    argv = command.split()[3:]
    assert argv[:2] == ["--config", f"recipes/{path.name}"] and argv[2] == "--output_dir"
    given = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"\w+: \S+  # \S.{10,}", line) for line in given)
    monkeypatch.chdir(ROOT)
    cfg = parse_config(argv)
    for line in given:
        name, value = line.split("  #")[0].split(": ")
        assert name in Config.__dataclass_fields__ and getattr(cfg, name) == type(getattr(cfg, name))(value), line
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("".join((toys / f"{name}.jsonl").read_text().splitlines(keepends=True)[-9:]))
    (tmp_path / "clips").symlink_to(toys / "clips")
    small = {"base_ckpt": toys / "checkpoint", "audio_tokenizer": "none", "device": "cpu", "num_workers": 0, "max_steps": 2}
    small |= {"train_manifest": tmp_path / "train.jsonl", "sample_steps": 0, "max_tokens": 400 if cfg.max_tokens else 0}
    small |= {name: tmp_path / "val.jsonl" for name in ("val_manifest", "drift_manifest") if getattr(cfg, name)}
    assert train.main([*argv, *to_argv(small), "--output_dir", str(tmp_path / "o")]) == 0
    run = json.loads((tmp_path / "o" / "config.json").read_text())
    names = {line.split(":")[0] for line in given} - small.keys()
    assert all(run[name] == getattr(cfg, name) for name in names)
    assert len(metrics(tmp_path / "o", "train")) == 2 and metrics(tmp_path / "o", "val")
