"""The micro-batch of a run that names none: the largest that suits its data and its GPUs, chosen once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import read_json
from config import SAMPLES, Config, to_argv
from distributed import Dist, log

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = ("batch_size", "max_tokens", "activation_checkpointing")


def choose(cfg: Config, dist: Dist, measure: Callable[[], np.ndarray | None]) -> Config:
    """The settings with what was not given of CHOSEN: by tools/plan.py on a GPU, else four samples. Collective.

    measure: gives the positions of each training record, None where batches are padded rows
    """
    found = {"batch_size": cfg.samples, "activation_checkpointing": cfg.activation_checkpointing or "none"}
    is_open = cfg.batch_size is None and not cfg.max_tokens
    if is_open and (room := min(dist.gather(free_bytes(dist.device)))) and (lengths := measure()) is not None:
        log(dist, "neither --batch_size nor --max_tokens is given: finding what fits, for a minute")
        answer = dist.from_main(dist.together(lambda: ask(cfg, lengths, room, dist.world_size) if dist.is_main else None))
        found |= {name: answer[name] for name in CHOSEN if name in answer}
        flags = " ".join(f"--{name} {answer[name]}" for name in CHOSEN if name in answer)
        log(dist, f"chosen: {flags or f'--batch_size {SAMPLES}'}; {answer['reason']}")
    return dataclasses.replace(cfg, **found)


def free_bytes(device: torch.device) -> int:
    """Of a GPU, what this process has merely reserved included; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def ask(cfg: Config, lengths: np.ndarray, room: int, ranks: int) -> dict:
    """What `tools.plan.choose` finds. A process of its own, without the GPU: it imports train.py and makes fake ranks."""
    with tempfile.TemporaryDirectory() as temporary:
        settings, measured, answer = (Path(temporary, name) for name in ("config.json", "lengths.npy", "answer.json"))
        settings.write_text(json.dumps(dataclasses.asdict(cfg) | {"device": "cpu", "memory_snapshot": 0}))
        np.save(measured, lengths)
        told = {"config": settings, "lengths": measured, "room": room, "ranks": ranks, "json": answer}
        command = [sys.executable, str(ROOT / "tools/plan.py"), *to_argv(told)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "RANK": "0", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return read_json(answer)
    problem = (done.stderr.strip() or "it ended without a word").splitlines()[-1].removeprefix("error: ")
    return {"reason": f"what fits is not known: {problem}"}
