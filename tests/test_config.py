"""The command line: settings from flags and files, all problems of both together, and the help."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from test_resume import logged
from test_train import main_error, settings

import train
from common import ConfigError
from config import BASIC, FACTS, Config, parse_config, recipe

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
    (tmp_path / "data.yaml").write_text("train_manifest: mine\n")  # as `plan` takes it, which needs no manifest
    cfg = parse_config(["--config", str(tmp_path / "data.yaml")], train_manifest="-", output_dir="-")
    assert (cfg.train_manifest, cfg.output_dir) == ("mine", "-")


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
    assert "\nbatch_size: 8  # default: 4, or on a GPU" in text and "lora_r" not in text and "output_dir:" not in text
    run = json.loads((tmp_path / "o" / "config.json").read_text())
    assert set(run) - {f.name for f in dataclasses.fields(Config)} == set(FACTS)
    for name in ("recipe.yaml", "config.json"):
        other = tmp_path / name.split(".")[0]
        assert train.main(["--config", str(tmp_path / "o" / name), "--output_dir", str(other)]) == 0
        assert logged(other) == logged(tmp_path / "o")


def test_a_mistake_in_a_file_ends_the_run(tmp_path, capsys):
    assert "mine.yaml line 1: unknown setting 'lorar'" in main_error(written(tmp_path, "lorar: 3"), capsys)


# ---- help, and mistakes in names


def answer(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        train.main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_grouped_and_true(capsys):
    """What most runs need; everything on request, each setting once, with its choices and the default that it has."""
    pages = [answer(capsys, *words) for words in (["--help"], ["--help", "advanced"])]
    short, everything = (" ".join(page.split()) for page in pages)
    headings = ["Data", "Model", "Batches and length", "Optimizer and loss", "Precision, memory and speed"]
    headings += ["Evaluation, samples and checkpoints", "Health"]
    starts = [everything.index(f" {heading}: --") for heading in headings]
    assert starts == sorted(starts) and all(f" {heading}: --" in short for heading in headings)
    for f in dataclasses.fields(Config):
        flag = f"\n  --{', --'.join([f.name, *f.metadata['aliases']])}"
        counts = [len(re.findall(rf"{flag}(?! ,)\b", page)) for page in pages]
        assert counts == [f.name in BASIC, 1], f.name
    assert (
        f"{len(dataclasses.fields(Config)) - len(BASIC)} more settings: --help advanced" in short and "--config FILE" in short
    )
    assert "--lora_r N LoRA rank; 0: full fine-tune; default: 16 --" in short
    assert "--mixed_precision TEXT compute dtype; masters stay float32; auto is bf16, or on GPUs without it fp16 with a loss scale; one of auto, bf16, fp16, no; default: auto --" in short
    assert "peak learning rate; default: 2e-4 for LoRA, 2e-5 for a full fine-tune --" in short
    assert "default: None" not in everything and "--dry_run build" in short


def test_only_one_rank_answers(capsys, monkeypatch):
    assert "--train_manifest" in answer(capsys, "-h")
    monkeypatch.setenv("RANK", "1")
    assert answer(capsys, "--help") == ""


def test_version(capsys):
    found = answer(capsys, "--version")
    assert re.fullmatch(r"higgs-audio-v2-trainer \d+\.\d+\.\d+, commit (\w{40}|unknown), torch 2\S+\n", found)


def test_the_nearest_name_is_suggested(tmp_path, capsys):
    """To flags, aliases and names in a file; a value after an unknown flag is no mistake of its own."""
    typos = ["--lora-rank", "8", "--learnig_rate=1", "--zzz", "1", "stray", "--ouput_dir"]
    error = main_error([*written(tmp_path, "warmup_step: 3"), *typos], capsys)
    for part in (
        "'--lora_rank'; did you mean --lora_r?",
        "'--learnig_rate'; did you mean --learning_rate?",
        "unknown argument '--zzz'\n",
        "unknown argument 'stray'\n",
        "'--ouput_dir'; did you mean --output_dir?",
        "line 1: unknown setting 'warmup_step'; did you mean warmup_steps?",
        "6 problems",
    ):
        assert part in error, part


def test_hyphens_are_as_good_as_underscores():
    cfg = parse_config(["--train-manifest", "a-b", "--output-dir=o-p", "--lora-r=4", "--merge-lora", "--min-lr-ratio", "0.1"])
    assert (cfg.train_manifest, cfg.output_dir, cfg.lora_r, cfg.merge_lora, cfg.min_lr_ratio) == ("a-b", "o-p", 4, True, 0.1)
