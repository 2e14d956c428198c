"""The command line: settings from a file, all problems of both together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_resume import logged
from test_train import main_error, settings

import train
from common import ConfigError
from config import FACTS, Config, parse_config, recipe

GIVEN = ["--train_manifest", "m", "--output_dir", "o"]


def written(tmp_path: Path, text: str, name: str = "mine.yaml") -> list[str]:
    (tmp_path / name).write_text(text)
    return [*GIVEN, "--config", str(tmp_path / name)]


# ---- --config


def test_a_file_gives_what_flags_give(tmp_path):
    """Names, aliases and hyphens; values as they are typed, which YAML alone would read as other types; flags win."""
    text = "# why\nlearning_rate: 2e-4  # not a text\nlora-r: 8\nmixed_precision: no\nbest_by: ''\nmerge_lora: yes\nval_manifest:\nseed: 3\n"
    cfg = parse_config([*written(tmp_path, text), "--seed", "4", "--gradient_accumulation_steps", "2"])
    assert (cfg.lr, cfg.lora_r, cfg.mixed_precision, cfg.best_by) == (2e-4, 8, "no", "")
    assert (cfg.merge_lora, cfg.val_manifest, cfg.seed, cfg.grad_accum) == (True, "", 4, 2)
    assert parse_config(written(tmp_path, "{}")) == parse_config(GIVEN)


def test_mistakes_in_a_file_are_reported_with_those_of_flags(tmp_path):
    text = "lorar: 3\nlr: fast\nepochs: [1, 2]\nmodel:\n  lora_r: 4\nlong: cut\nseed: 1\nseed: 2\nlora_alpha: 0\n"
    with pytest.raises(ConfigError) as error:
        parse_config([*written(tmp_path, text), "--batch_size", "two"])
    found, where = str(error.value), f"{tmp_path / 'mine.yaml'} line"
    for part in (
        f"{where} 1: unknown setting 'lorar'",
        f"{where} 2: lr fast: expected float",
        f"{where} 3: epochs is a list",
        f"{where} 4: unknown setting 'model'",
        f"{where} 6: long cut: choose from error, skip, crop",
        f"{where} 8: seed is given twice",
        "--batch_size two: expected int",
        "--lora_alpha 0: the adapter would have no effect",
        "8 problems",
    ):
        assert part in found
    with pytest.raises(ConfigError, match=r"line 1: lr has settings below it"):
        parse_config(written(tmp_path, "lr:\n  peak: 1\n"))


@pytest.mark.parametrize(
    "text", ["lr: [", "- lr", "lr", "lr: 1\n---\nlr: 2\n", "a: !!python/object:os.system x", "lr: *x", "\x00", "[" * 9999]
)
def test_no_file_of_settings_at_all(text, tmp_path):
    with pytest.raises(ConfigError, match=r"mine.yaml"):
        parse_config(written(tmp_path, text))
    with pytest.raises(ConfigError, match=r"--config nowhere.yaml: cannot be read"):
        parse_config([*GIVEN, "--config", "nowhere.yaml"])


def test_a_recipe_holds_every_setting(tmp_path):
    """Whatever a setting may be, and with quotes, blanks and signs that mean something to YAML."""
    odd = {"str": "a: b # c, 'd' \"e\" é", "int": 7, "float": 1.5e-05, "bool": True}
    own = {"output_dir", "resume", "resume_changed", "dry_run"}  # of one run
    for f in dataclasses.fields(Config):
        choices = [choice for choice in f.metadata["choices"] or () if choice != f.default]
        value = choices[0] if choices else odd[str(f.type).split(" ")[0]]
        cfg = dataclasses.replace(Config(train_manifest="m", output_dir="o"), **{f.name: value})
        (tmp_path / "recipe.yaml").write_text(recipe(cfg))
        assert (f"\n{f.name}: " in recipe(cfg)) == (f.name not in own), f.name
        try:
            found = parse_config(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "o"])
            assert found == (Config("m", output_dir="o") if f.name in own else cfg), f.name
        except ConfigError as error:  # impossible by itself: the rules refuse the value that was read
            assert "recipe.yaml" not in str(error), f.name


def test_a_run_is_repeated_by_its_recipe_and_by_its_config(toys, tmp_path):
    """Both give the same steps to the bit."""
    argv = settings(toys, tmp_path / "o", lora_dropout=0.1, seed=3, mixed_precision="no")
    assert train.main(argv) == 0
    text = (tmp_path / "o" / "recipe.yaml").read_text()
    assert f"launch.sh --config {tmp_path}/o/recipe.yaml --output_dir OTHER" in text
    assert "\nbatch_size: 8  # default: 4\n" in text and "lora_r" not in text and "output_dir:" not in text
    run = json.loads((tmp_path / "o" / "config.json").read_text())
    assert set(run) - {f.name for f in dataclasses.fields(Config)} == set(FACTS)
    for name in ("recipe.yaml", "config.json"):
        other = tmp_path / name.split(".")[0]
        assert train.main(["--config", str(tmp_path / "o" / name), "--output_dir", str(other)]) == 0
        assert logged(other) == logged(tmp_path / "o")


def test_a_mistake_in_a_file_ends_the_run(tmp_path, capsys):
    assert "mine.yaml line 1: unknown setting 'lorar'" in main_error(written(tmp_path, "lorar: 3"), capsys)
