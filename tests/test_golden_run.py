"""What earlier versions have stored still reads, orders its data and trains on as it did then; see make_golden_run.py."""

from __future__ import annotations

import json
import shutil

import pytest
from make_golden_run import FLAGS, GOLDEN, order
from safetensors.torch import load_file

import checkpoint
import export.__main__
import train


def test_order():
    """Of epochs, micro-batches and steps: another order would repeat or leave out samples in runs that are resumed."""
    assert json.loads(json.dumps(order())) == json.loads((GOLDEN / "order.json").read_text())


@pytest.mark.parametrize("version", range(1, checkpoint.FORMAT + 1))
def test_stored_checkpoints(version, tmp_path, monkeypatch):
    """Each is exported as it is, and resumed: the next steps see the samples, and have the losses, that they had then."""
    monkeypatch.chdir(shutil.copytree(GOLDEN, tmp_path / "run"))
    stored = f"format_{version}/checkpoints/step_2"
    assert checkpoint.read_state(tmp_path / "run" / stored).get("format", 1) == version
    assert export.__main__.main(["export", stored, "model"]) == 0
    state, model = load_file(f"{stored}/shard-00001-of-00001.safetensors"), load_file("model/adapter_model.safetensors")
    masters = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    assert len(masters) == len(model) > 0
    assert sorted(t.double().sum().item() for t in masters.values()) == sorted(t.double().sum().item() for t in model.values())
    assert train.main([*FLAGS, "--output_dir", "out", "--resume", stored]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "out" / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((GOLDEN / "steps.json").read_text())[2:]
    found = [{name: line[name] for name in expected[0]} for line in lines if line["split"] == "train"]
    assert [step | {"loss": pytest.approx(step["loss"], rel=1e-4)} for step in expected] == found
