"""What a checkpoint may continue: the run, the data and the base it was saved with; nothing is removed or mixed unsaid."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_export import same, weights
from test_resume import logged, settings

import checkpoint
import collate
import data
import train
from config import parse_config
from export import pretrained
from export.__main__ import main as export_main
from process import lineage


def steps(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").glob("step_*"))


def refused(capsys, argv: list[str], *words: str) -> str:
    capsys.readouterr()
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def finished(toys, tmp_path_factory) -> Path:
    """OUTPUT of eight steps with all their checkpoints of even steps."""
    output = tmp_path_factory.mktemp("finished") / "o"
    assert train.main(settings(toys, output, max_steps=8, save_steps=2, val_steps=0, keep_last=0)) == 0
    return output


@pytest.fixture()
def run_folder(finished, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# ---- later checkpoints


def test_later_checkpoints_are_set_aside(run_folder, toys, capsys):
    """Whoever goes back to step 2 leaves the branch with steps 4, 6 and 8: they are kept elsewhere, and `auto` does not see them."""
    argv = settings(toys, run_folder, save_steps=2, val_steps=0, keep_last=2)
    assert train.main([*argv, "--max_steps", "4", "--resume", str(run_folder / "checkpoints" / "step_2")]) == 0
    assert "set aside" in capsys.readouterr().err
    assert steps(run_folder) == ["step_2", "step_4"], "what was resumed from and what was just saved are still there"
    aside = run_folder / "checkpoints" / "set_aside"
    assert sorted(path.name for path in aside.iterdir()) == ["step_4", "step_6", "step_8"]
    assert all(checkpoint.find_damage(path) is None for path in aside.iterdir())
    assert train.main([*argv, "--max_steps", "5", "--resume", "auto"]) == 0
    assert "resumed from" in (error := capsys.readouterr().err) and "step_4: 4 steps done" in error


def test_setting_aside_twice_loses_nothing(run_folder):
    first = lineage.set_aside(run_folder, 6)
    shutil.copytree(run_folder / "checkpoints" / "step_6", run_folder / "checkpoints" / "step_8")
    second = lineage.set_aside(run_folder, 6)
    assert [path.name for path in (*first, *second)] == ["step_8", "step_8.1"]


def test_damaged_checkpoints_do_not_count(run_folder, toys):
    """--keep_last 1, and the last one before is damaged: the whole one before that stays until there is another."""
    (run_folder / "checkpoints" / "step_6" / "state.json").write_text("{")
    shutil.rmtree(run_folder / "checkpoints" / "step_8")
    argv = settings(toys, run_folder, max_steps=8, save_steps=2, val_steps=0, keep_last=2, resume="auto")
    assert train.main(argv) == 0
    assert steps(run_folder) == ["step_6", "step_8"]
    assert checkpoint.find_damage(run_folder / "checkpoints" / "step_6") is None


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(run_folder, toys, monkeypatch, capsys):
    rmtree = shutil.rmtree

    def fail(path, ignore_errors=False, **kwargs):
        if "step_" in Path(path).name and not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, ignore_errors, **kwargs)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", fail)
    argv = settings(toys, run_folder, max_steps=10, save_steps=2, val_steps=0, keep_last=1, resume="auto")
    assert train.main(argv) == 0
    assert "warning: " in (error := capsys.readouterr().err) and "cannot be removed" in error
    assert checkpoint.list_states(run_folder / "checkpoints")[-1].name == "step_10"


# ---- what a checkpoint continues


def changed_data(toys: Path, folder: Path, name: str) -> dict:
    """Settings of the same run on other data."""
    records = (toys / "train.jsonl").read_text().splitlines()
    (folder / "clips").symlink_to(toys / "clips")
    if name == "reordered":
        random.Random(0).shuffle(records)
    if name == "edited":
        records[3] = records[3].replace('"role": "user", "content": "', '"role": "user", "content": "x')
    (folder / "train.jsonl").write_text("\n".join(records) + "\n")
    return {"train_manifest": folder / "train.jsonl"}


@pytest.mark.parametrize("name", ["reordered", "edited"])
def test_other_data_is_refused_or_taken_knowingly(name, finished, toys, tmp_path, capsys):
    """Reordered records would mean others than were trained; here validation records are held out of them as well."""
    (tmp_path / "data").mkdir()
    extra = changed_data(toys, tmp_path / "data", name)
    argv = settings(toys, tmp_path / "o", max_steps=10, save_steps=0, val_steps=0, resume=finished / "checkpoints" / "step_4")
    argv += [word for item in extra.items() for word in (f"--{item[0]}", str(item[1]))]
    refused(capsys, argv, "the training records", "--resume_changed")
    assert train.main([*argv, "--resume_changed"]) == 0
    assert "the training records" in capsys.readouterr().err
    assert [line["step"] for line in logged(tmp_path / "o") if line["split"] == "train"] == list(range(5, 11))


def test_the_same_data_elsewhere_is_the_same(finished, toys, tmp_path):
    shutil.copytree(toys, tmp_path / "moved")
    argv = settings(tmp_path / "moved", tmp_path / "o", max_steps=5, val_steps=0, resume=finished / "checkpoints" / "step_4")
    assert train.main(argv) == 0


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"train_manifest": "a:1,b:1"}, {"train_manifest": "a:1,b:2"}, "weights"),
        ({"max_tokens": 400, "long": "skip"}, {"max_tokens": 400, "long": "crop"}, "long was 'skip' and is 'crop'"),
        ({"val_manifest": "", "val_share": 0.2}, {"val_manifest": "", "val_share": 0.3}, "training_samples was 25 and is 22"),
    ],
)
def test_another_mixture_or_packing_is_refused(before, after, words, toys, tmp_path, capsys):
    records = (toys / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"a": records[:12], "b": records[12:]}.items():
        (tmp_path / name).write_text("".join(part))
    (tmp_path / "clips").symlink_to(toys / "clips")

    def argv(output: str, values: dict, **extra) -> list[str]:
        values = dict(values)
        if values.get("train_manifest"):
            values["train_manifest"] = values["train_manifest"].replace("a:", f"{tmp_path}/a:").replace("b:", f"{tmp_path}/b:")
        return settings(toys, tmp_path / output, **{"val_steps": 1, "max_steps": 1, "save_steps": 1, **values, **extra})

    assert train.main(argv("o", before)) == 0
    saved = tmp_path / "o" / "checkpoints" / "step_1"
    refused(capsys, argv("p", after, max_steps=2, resume=saved), words)
    assert train.main(argv("q", before, max_steps=2, resume=saved)) == 0


def test_another_base_is_refused_or_taken_knowingly(finished, toys, tmp_path, capsys):
    """One changed number in the middle of the weights; a copy of the same base somewhere else is the same base."""
    base = tmp_path / "base"
    shutil.copytree(toys / "checkpoint", base)
    argv = settings(toys, tmp_path / "o", base_ckpt=base, max_steps=5, val_steps=0, resume=finished / "checkpoints" / "step_4")
    assert train.main([*argv, "--output_dir", str(tmp_path / "p")]) == 0
    tensors = {name: tensor.clone() for name, tensor in weights(base).items()}
    for tensor in tensors.values():
        tensor += 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, argv, "the base checkpoint", "--resume_changed")
    assert train.main([*argv, "--resume_changed"]) == 0


def test_other_validation_records_are_a_note(toys, tmp_path, capsys):
    """The training records are the same: only the best evaluation so far cannot be compared any more."""
    argv = settings(toys, tmp_path / "o", max_steps=2, save_steps=1, val_steps=1)
    assert train.main(argv) == 0
    assert checkpoint.read_state(tmp_path / "o" / "checkpoints" / "step_2")["best"]
    (tmp_path / "val.jsonl").write_text((toys / "val.jsonl").read_text() + (toys / "test.jsonl").read_text())
    (tmp_path / "clips").symlink_to(toys / "clips")
    argv += ["--resume", "auto", "--val_manifest", str(tmp_path / "val.jsonl"), "--max_steps", "3"]
    assert train.main(argv) == 0
    assert "note: the validation records have changed" in capsys.readouterr().err


def test_other_code_is_a_note(run_folder, toys, monkeypatch, capsys):
    monkeypatch.setattr(lineage, "code_commit", lambda: "f" * 40)
    assert train.main(settings(toys, run_folder, max_steps=9, val_steps=0, resume="auto")) == 0
    assert f"commit {'f' * 40}" in capsys.readouterr().err


def test_ancestry(finished, toys, tmp_path):
    """A run has one id through its resumes; a branch has its own, and names the step it came from."""
    argv = settings(toys, tmp_path / "o", max_steps=5, save_steps=1, val_steps=0)
    assert train.main([*argv, "--resume", str(finished / "checkpoints" / "step_4")]) == 0
    assert train.main([*argv, "--max_steps", "6", "--resume", "auto"]) == 0
    origin, *own = (
        checkpoint.read_state(path)
        for path in (finished / "checkpoints" / "step_4", *checkpoint.list_states(tmp_path / "o" / "checkpoints"))
    )
    assert origin["parent"] is None and [state["step"] for state in own] == [5, 6]
    assert own[0]["run_id"] == own[1]["run_id"] != origin["run_id"]
    assert own[0]["parent"] == {"run_id": origin["run_id"], "step": 4}
    assert own[1]["parent"] == {"run_id": own[0]["run_id"], "step": 5}


def test_two_runs_are_not_mixed(finished, run_folder, toys, tmp_path, capsys):
    """A checkpoint from elsewhere does not continue in a folder that holds another run; a copy of its own does."""
    assert train.main(settings(toys, tmp_path / "o", max_steps=2, save_steps=1, val_steps=0)) == 0
    step = finished / "checkpoints" / "step_4"
    refused(capsys, settings(toys, tmp_path / "o", max_steps=5, resume=step), "holds a run already")
    assert train.main(settings(toys, run_folder, max_steps=5, val_steps=0, resume=step)) == 0


def test_auto_never_begins_afresh_over_a_run(run_folder, toys, tmp_path, capsys):
    argv = settings(toys, run_folder, max_steps=2, val_steps=0, resume="auto")
    for path in (run_folder / "checkpoints").iterdir():
        (path / "state.json").unlink()
    refused(capsys, argv, "no whole checkpoint", "choose another folder")
    shutil.rmtree(run_folder / "checkpoints")
    refused(capsys, argv, "no whole checkpoint")
    shutil.rmtree(run_folder / "final")
    refused(capsys, argv, "no whole checkpoint")  # interrupted without --save_steps
    assert train.main(settings(toys, tmp_path / "new", max_steps=1, val_steps=0, resume="auto")) == 0


def test_a_run_killed_before_its_first_checkpoint_begins_again(toys, tmp_path, capsys):
    """Nothing was saved that could be lost: a job script with --resume auto gets on."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "metrics.jsonl").write_text('{"split": "train", "step": 1}\n')
    assert train.main(settings(toys, tmp_path / "o", max_steps=3, save_steps=2, val_steps=0, resume="auto")) == 0
    assert "begins again" in capsys.readouterr().err
    assert [line["step"] for line in logged(tmp_path / "o") if line["split"] == "train"] == [1, 2, 3]


# ---- files


def test_a_stale_shard_is_refused(run_folder, toys, capsys):
    """Weights of step 8 under the state of step 2: what state.json does not list is not loaded, and not passed over."""
    step = run_folder / "checkpoints" / "step_2"
    (own,) = step.glob("shard-*.safetensors")
    shutil.copy(run_folder / "checkpoints" / "step_8" / own.name, step / "shard-00002-of-00002.safetensors")
    argv = settings(toys, run_folder, max_steps=3, val_steps=0, resume=step)
    refused(capsys, argv, "shard-00002-of-00002.safetensors", "not part of this checkpoint")
    (step / "shard-00002-of-00002.safetensors").unlink()
    (step / "notes.txt").write_text("mine")
    (step / ".nfs0001").write_text("a file system's own")
    assert train.main(argv) == 0


def test_an_edited_state_file_is_noticed(run_folder, toys, capsys):
    path = run_folder / "checkpoints" / "step_8" / "state.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 7', 1))
    refused(capsys, settings(toys, run_folder, max_steps=9, resume=path.parent), "state.json has changed")


def test_weight_files_of_a_base_are_unambiguous(toys, tmp_path, capsys):
    """Two files beside each other: an index says which ones count, without one it is an error."""
    base = tmp_path / "base"
    shutil.copytree(toys / "checkpoint", base)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights(base).items()}
    save_file(zeros, base / "older.safetensors", metadata={"format": "pt"})
    argv = settings(toys, tmp_path / "o", base_ckpt=base, max_steps=1, val_steps=0)
    refused(capsys, argv, "model.safetensors, older.safetensors", "model.safetensors.index.json")
    index = {"weight_map": dict.fromkeys(zeros, "model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert train.main(argv) == 0
    plain = settings(toys, tmp_path / "p", max_steps=1, val_steps=0)
    assert train.main(plain) == 0
    assert same(weights(tmp_path / "o" / "final"), weights(tmp_path / "p" / "final"))
    index["weight_map"]["norm.weight"] = "gone.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, settings(toys, tmp_path / "q", base_ckpt=base, max_steps=1), "gone.safetensors")


# ---- copied elsewhere


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_checkpoint_is_complete_by_itself(lora_r, toys, tmp_path, monkeypatch):
    """Copied away, its run and its base's folder gone, it is exported; with a base it is resumed."""
    shutil.copytree(toys, tmp_path / "toys")
    monkeypatch.chdir(tmp_path)
    argv = settings(Path("toys"), Path("o"), lora_r, max_steps=2, save_steps=1, val_steps=0)
    assert train.main(argv) == 0
    final = weights(tmp_path / "o" / "final")
    shutil.move(tmp_path / "o" / "checkpoints" / "step_2", tmp_path / "mine")
    shutil.rmtree(tmp_path / "o")
    shutil.move(tmp_path / "toys", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path.parent)
    assert export_main(["export", str(tmp_path / "mine"), str(tmp_path / "model")]) == 0
    assert same(weights(tmp_path / "model"), final)
    assert "--lr 0.001" in (tmp_path / "model" / "README.md").read_text()
    argv = settings(tmp_path / "elsewhere", tmp_path / "q", lora_r, max_steps=3, val_steps=0, resume=tmp_path / "mine")
    assert train.main(argv) == 0


def test_a_checkpoint_of_the_version_before_resumes(run_folder, toys, tmp_path, capsys):
    """Without lineage, checksum and companion files; what cannot be compared is said."""
    for step in (run_folder / "checkpoints").iterdir():
        state = checkpoint.read_state(step)
        old = {name: state[name] for name in ("step", "position", "bad_steps", "bad_samples", "spikes", "losses", "best")}
        names = ("seed", "lora_r", "lora_alpha", "lora_targets", "freeze", "max_tokens", "ema", "training_samples")
        old["run"] = {name: (state["run"] | state["data"])[name] for name in names}
        old["files"] = {name: about for name, about in state["files"].items() if name.endswith(".safetensors")}
        (step / "state.json").write_text(json.dumps(old))
        shutil.rmtree(step / "base")
    assert train.main(settings(toys, run_folder, max_steps=9, val_steps=0, resume="auto")) == 0
    assert "saved by an earlier version" in capsys.readouterr().err
    assert export_main(["export", str(run_folder / "checkpoints" / "step_8"), str(tmp_path / "model")]) == 0


def test_a_checkpoint_of_a_later_version_is_refused(run_folder, toys, capsys):
    path = run_folder / "checkpoints" / "step_8" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": checkpoint.FORMAT + 1}))
    refused(capsys, settings(toys, run_folder, max_steps=9, resume=path.parent), "later version", "update")


# ---- fingerprints


def test_fingerprints_are_cheap(tmp_path):
    """A few kilobytes of each file are read, however large it is; any tensor's change is likely to be seen."""
    big = tmp_path / "big"
    big.mkdir()
    with open(big / "model.safetensors", "wb") as file:
        header = json.dumps({"x": {"dtype": "U8", "shape": [2**33], "data_offsets": [0, 2**33]}}).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)
    (big / "config.json").write_text("{}")
    first = pretrained.fingerprint(big)  # 8 GB: reading them would take this test longer than its time limit
    with open(big / "model.safetensors", "r+b") as file:
        file.seek(8 + len(header))
        file.write(b"other")
    assert pretrained.fingerprint(big) != first


def test_lengths_belong_to_their_records(toys, tmp_path):
    """A hold-out with another seed, other codebooks or another codec: lengths are measured anew."""
    keys = set()
    config, tokenizer = pretrained.read_base_config(toys / "checkpoint"), pretrained.load_tokenizer(toys / "checkpoint")
    collator = collate.create_collator(config)
    for seed in (0, 1):
        cfg = parse_config(settings(toys, tmp_path / "o", max_tokens=400, val_manifest="", seed=seed))
        dist = train.setup_distributed("cpu")
        loader, _ = data.build_loaders(cfg, dist, config, tokenizer, *data.read_records(cfg, dist))
        own = [loader.dataset.length(record, collator) for record in loader.dataset.records]
        assert loader.batching.lengths.tolist() == own
        keys |= {path.name for path in (tmp_path / "o" / "codes").glob("lengths-*")}
    assert len(keys) >= 3
