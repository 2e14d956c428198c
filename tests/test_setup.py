"""What `bash launch.sh` says while it sets up and when it cannot, and a GPU that PyTorch does not see."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train
from common import ConfigError
from process.gpu import on_gpu

# A Python whose pip prints what it is told to, and whose venv makes a copy of it.
STAND_IN = """#!/bin/bash
case "$*" in
*" -m venv "* | "-m venv "*) folder=${!#}; rm -rf "$folder"; mkdir -p "$folder/bin"; touch "$folder/pyvenv.cfg"; cp "$0" "$folder/bin/python" ;;
*"pip --version") exit 0 ;;
*"pip install"*) cat <<'TEXT'
SAYS
TEXT
exit STATUS ;;
*) [ "$1" = -c ] && exec REAL "$@" || echo Python 3.11.7 ;;
esac
"""
OF_PIP = """Collecting torch<=2.13.0,>=2.11 (from -r requirements.txt (line 3))
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (532.4 MB)
  Downloading dacite-1.9.2-py3-none-any.whl (16 kB)
Installing collected packages: torch, dacite, numpy
Successfully installed torch-2.13.0"""
NO_NETWORK = """WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by 'NewConnectionError': /simple/torch/
ERROR: No matching distribution found for torch"""
NO_SPACE = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"


def make_python(path: Path, says: str = OF_PIP, status: int = 0) -> Path:
    path.write_text(STAND_IN.replace("SAYS", says).replace("STATUS", str(status)).replace("REAL", sys.executable))
    path.chmod(0o755)
    return path


def set_up(venv: Path, python: Path | str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"VENV": str(venv), "PYTHON": str(python)} | environment
    command = ["bash", ROOT / "launch.sh", "setup"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_steps_and_large_downloads_are_shown(tmp_path):
    done = set_up(tmp_path / "venv", make_python(tmp_path / "python"))
    first, *steps, last = done.stderr.splitlines()
    assert first.startswith(f"setting up {tmp_path}/venv for 'setup': ") and re.fullmatch(
        r"done, \d+ s after the start; now: setup", last
    )
    large = [
        "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (532.4 MB)",
        "  unpacking 3 package(s)",
    ]
    titles = [line for line in steps if line.startswith("[")]
    assert [line[:8] for line in titles] == ["[1 of 3]", "[2 of 3]", "[3 of 3]"] and steps[2:4] == large and not done.stdout
    assert set_up(tmp_path / "venv", "no-python-is-needed").stderr == ""


def test_on_a_terminal_one_line_changes(tmp_path):
    if not shutil.which("script"):
        pytest.skip("needs `script`, which makes a terminal")
    environment = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(make_python(tmp_path / "python"))}
    command = ["script", "-qec", f"bash {ROOT}/launch.sh setup", "/dev/null"]
    shown = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True).stdout.decode()
    assert "\r\033[K  Collecting torch<=2.13.0,>=2.11\r\033[K  Downloading torch-" in shown
    assert shown.count("\n") == 5  # what it does, three steps, the time


@pytest.mark.parametrize("says", [NO_NETWORK, NO_SPACE, "ERROR: something else\n\n"])
def test_what_keeps_pip_from_installing_is_one_line(says, tmp_path):
    venv = tmp_path / "venv"
    done = set_up(venv, make_python(tmp_path / "python", says, 1))
    expected = {
        NO_NETWORK: "error: no network: the package index does not answer; .*PIP_INDEX_URL=.*",
        NO_SPACE: f"error: no space left for {venv} or in /.*: make room .*VENV=, TMPDIR=",
    }.get(says, f"error: the set-up of {venv} failed: ERROR: something else")
    assert done.returncode == 2 and re.fullmatch(expected, done.stderr.splitlines()[-1])
    assert not (venv / ".installed").exists()
    make_python(venv / "bin" / "python")
    assert set_up(venv, make_python(tmp_path / "python")).returncode == 0, "the same command again"


def test_a_full_disk_while_the_environment_is_made(tmp_path):
    """With the real venv and ensurepip, which say only that they failed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("cannot mount a file system here")
    try:
        done = set_up(disk / "venv", sys.executable)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 2 and f"error: no space left for {disk}/venv " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("state", ["half made", "its Python is gone", "empty", "of something else", "a file", "works"])
def test_only_a_virtual_environment_is_made_anew(state, tmp_path):
    venv, python = tmp_path / "venv", make_python(tmp_path / "python")
    if state == "a file":
        venv.touch()
    else:
        (venv / "bin").mkdir(parents=True)
    if state in ("half made", "its Python is gone"):
        (venv / "pyvenv.cfg").touch()
        (venv / ".installed-evaluate").touch()
    if state == "its Python is gone":
        (venv / "bin" / "python").symlink_to(tmp_path / "gone")
    if state == "empty":
        (venv / "bin").rmdir()
    if state == "of something else":
        (venv / "thesis.txt").touch()
    if state == "works":  # one of conda, say: it has no pyvenv.cfg, and nothing in it is replaced
        make_python(venv / "bin" / "python")
        (venv / "conda-meta").touch()
    done = set_up(venv, python)
    if state in ("of something else", "a file"):
        assert (
            done.returncode == 2 and f"error: VENV={venv} is no virtual environment" in done.stderr and "VENV=" in done.stderr
        )
        assert (venv / "thesis.txt").exists() or venv.is_file()
    else:
        assert done.returncode == 0 and (venv / ".installed").is_file()
        assert ("it is made anew" in done.stderr) == (state in ("half made", "its Python is gone"))
        assert (venv / "conda-meta").exists() == (state == "works") and not (venv / ".installed-evaluate").exists()


@pytest.mark.parametrize(
    "change", ["sys.version_info = (3, 13, 1)", "sys.version_info = (3, 9, 2)", "sys.modules['ensurepip'] = None", ""]
)
def test_python_is_checked_before_anything_is_made(change, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 9\nc=$2; shift 2\nexec {sys.executable} -c "import sys; {change}\n$c" "$@"\n'
    )
    python.chmod(0o755)
    if not change:
        python.unlink()
    done = set_up(tmp_path / "venv", python)
    message = done.stderr.splitlines()[-1]
    found = "3.13" if "13" in change else "3.9"
    expected = f"error: {python} is Python {found}, but 3.10 to 3.12 work; name one: PYTHON=python3.11 bash launch.sh"
    if "ensurepip" in change:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        expected = f"error: Python {version} has no ensurepip (Debian, Ubuntu: sudo apt install python{version}-venv)"
    if not change:
        expected = f"error: no {python} here; install Python 3.10 to 3.12 (Debian, Ubuntu: sudo apt install python3-venv) or name it: PYTHON="
    assert done.returncode == 2 and message == expected and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path != python] == []


# ---- a GPU that PyTorch does not see


@pytest.fixture()
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in on PATH that shows two GPUs and a driver of 2022."""
    path = tmp_path / "nvidia-smi"
    header = "| NVIDIA-SMI 470.103.01   Driver Version: 470.103.01   CUDA Version: 11.4     |"
    gpus = "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)\nGPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-2)"
    path.write_text(f"#!/bin/sh\n[ \"$1\" = --list-gpus ] && echo '{gpus}' || echo '{header}'\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("UNSEEN_GPU_IS_FINE")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("build", [None, "13.0", "11.4"])
def test_a_gpu_that_pytorch_does_not_see(build, nvidia_smi, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", build)
    expected = {
        None: r"this PyTorch, \S+, is built for the CPU only: install a build for CUDA, with \S+/bin/pip, .*get-started",
        "13.0": r"its driver 470.103.01 runs CUDA up to 11.4 and this PyTorch, \S+, is built for CUDA 13.0: update the driver",
        "11.4": r"this PyTorch, \S+, does not see it",
    }
    for device in ("auto", "cuda"):
        start = r"nvidia-smi shows 2 GPU\(s\), NVIDIA A100-SXM4-40GB, but "
        with pytest.raises(ConfigError, match=f"{start}{expected[build]}.* --device cpu, or CUDA_VISIBLE_DEVICES= in front"):
            on_gpu(device)
    assert not on_gpu("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not on_gpu("auto")


def test_without_a_gpu_nothing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("UNSEEN_GPU_IS_FINE")
    monkeypatch.setenv("PATH", "")
    assert not on_gpu("auto")
    with pytest.raises(ConfigError, match="--device cuda: this PyTorch sees no GPU"):
        on_gpu("cuda")


def test_the_docker_file_sets_up_as_launch_sh_does(tmp_path):
    """Its RUN line for Python is launch.sh's own, and works with nothing but what was copied before it."""
    text = (ROOT / "Dockerfile").read_text()
    system, setup = re.findall(r"^RUN (.*(?:\\\n.*)*)", text, re.MULTILINE)
    assert "apt-get install" in system and setup == "bash launch.sh setup"
    copied = text[: text.index(f"RUN {setup}")]
    for name in re.search(r"^COPY (.*) \./$", copied, re.MULTILINE)[1].split():
        for path in ROOT.glob(name):
            shutil.copy(path, tmp_path)
    venv = re.search(r"^ENV .*VENV=(\S+)", copied, re.MULTILINE)[1]
    environment = os.environ | {"VENV": f"{tmp_path}{venv}", "PYTHON": str(make_python(tmp_path / "python"))}
    assert subprocess.run(setup.split(), cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (
        text.rstrip().endswith('ENTRYPOINT ["bash", "/trainer/launch.sh"]') and (tmp_path / venv[1:] / ".installed").is_file()
    )


def test_a_run_ends_before_anything_is_read(nvidia_smi, toys, tmp_path, capsys):
    """By the command itself; `--device cpu` runs."""
    argv = [
        "--train_manifest",
        str(toys / "train.jsonl"),
        "--output_dir",
        str(tmp_path / "o"),
        "--base_ckpt",
        str(toys / "checkpoint"),
    ]
    assert train.main([*argv, "--audio_tokenizer", "none", "--dry_run"]) == 2
    assert capsys.readouterr().err.startswith("error: nvidia-smi shows 2 GPU(s), NVIDIA A100-SXM4-40GB, but")
    assert train.main([*argv, "--audio_tokenizer", "none", "--dry_run", "--device", "cpu"]) == 0
