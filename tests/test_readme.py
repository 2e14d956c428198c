"""Every command of README.md and docs/, run as it stands there, and launch.sh.

The commands run in the order of `PAGES` on a *desk*: a folder that holds tiny things under the names that the pages use. All that is
changed is in `SUBSTITUTED` and `APPENDED`. Most run in this process, in one rank: what launch.sh would start is asked of
launch.sh, what torchrun would start of torchrun's own parser. `bash launch.sh` on two ranks and on two nodes are real launches.
A test alone lacks what the commands before it made; run the file as a whole.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT
from test_codec import write_wav
from test_cut import talk
from torch.distributed.run import parse_args

import train
from config import parse_config

sys.path.insert(0, str(ROOT / "benchmarks"))

# What README names as an example -> what is on the desk
SUBSTITUTED = {
    "runs/voice/spikes/step_812-rank0.safetensors": "runs/spoilt/spikes/step_2-rank0.safetensors",
    "step_175": "step_1",
    "step_180": "step_2",
    "node0": "127.0.0.1",
    "talk.m4a": "talk.wav",
    "--asr_model MODEL": "--asr_model recogniser",
    "--base_ckpt MODEL": "--base_ckpt checkpoint",
}
# What makes a command small: flags after those of README
APPENDED = {
    "train": "--base_ckpt checkpoint --audio_tokenizer codec --device cpu --num_workers 0 --batch_size 2 --grad_accum 1 "
    "--max_steps 2 --save_steps 1 --num_samples 1",
    "generate": "--audio_tokenizer codec --device cpu --max_new_tokens 20 --force_audio",
    "generate.evaluate": "--audio_tokenizer codec --device cpu --max_new_tokens 20 --force_audio --asr_model none --sv_model none",
    "tools.voice": "--help",  # test_voice_command.py goes the whole way
    "tools.plan": "--base_ckpt checkpoint --audio_tokenizer codec --num_workers 0 --ranks 1",
    "prepare encode": "--audio_tokenizer codec --device cpu --num_workers 1",
    "prepare transcribe": "--model whisper",
    "prepare check": "--audio_tokenizer codec",
    "prepare show": "--base_ckpt checkpoint --audio_tokenizer codec",
    "step": "--help",  # its smallest size runs in test_benchmarks.py
    "transcripts": "--help",
}
RUN_BY_CI = ("tools.demo", "pytest", "setup")
PACKAGES = ("prepare", "generate", "export")  # each with a __main__.py
MAKES_ITS_LAST_NAME = {
    "prepare convert",
    "prepare pair",
    "export export",
    "export merge",
    "export average",
}

IS_COMMAND = re.compile(r"(\w+=\S+ )*(bash|python|torchrun) \S")


def commands(text: str) -> list[str]:
    """Those in fenced blocks, their continued lines joined, and those in code spans, in order."""
    found = []
    for block, span in re.findall(r"^```\w*\n(.*?)^```|`([^`]+)`", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines() or [span]
        found += [" ".join(line.split()) for line in lines]
    return [line for line in dict.fromkeys(found) if IS_COMMAND.match(line)]


PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("training", "using", "clusters", "troubleshooting", "datasets", "how-it-works", "cuda")),
)
COMMANDS = commands("\n\n".join((ROOT / page).read_text() for page in PAGES))
OF_SEVERAL_NODES = [command for command in COMMANDS if "NNODES=" in command]


# ---- what a command runs


def make_environment(folder: Path, python: str) -> Path:
    """What launch.sh takes for the environment it has set up, with this script as its Python."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "bin" / "python").chmod(0o755)
    stamps = {
        ".installed": ("", "-codec"),
        ".installed-evaluate": ("-evaluate",),
        ".installed-nf4": ("-nf4",),
        ".installed-voice": ("-voice",),
    }
    for stamp, kinds in stamps.items():
        wanted = b"".join((ROOT / f"requirements{kind}.txt").read_bytes() for kind in kinds)
        (folder / stamp).write_bytes(subprocess.run("cksum", input=wanted, capture_output=True, check=True).stdout)
    return folder


def launch_sh(words: list[str], environment: dict[str, str], **kwargs) -> subprocess.CompletedProcess:
    values = {name: value for name, value in os.environ.items() if name not in ("TRAIN_MANIFEST", "NPROC")}
    values |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(ROOT / "launch.sh"), *words]
    return subprocess.run(command, env=values, capture_output=True, text=True, timeout=180, check=False, **kwargs)


@pytest.fixture(scope="module")
def asked_of_python(tmp_path_factory):
    """A function: what launch.sh asks its Python to run, given these words and variables."""
    folder = tmp_path_factory.mktemp("recorder")
    record = folder / "asked"
    venv = make_environment(folder / "venv", f"""printf '%s\\0' "$@" >'{record}'""")

    def ask(words: list[str], variables: dict[str, str]) -> list[str]:
        record.unlink(missing_ok=True)
        done = launch_sh(words, variables | {"VENV": str(venv)})
        assert done.returncode == 0, done.stderr
        asked = record.read_text().split("\0")[:-1] if record.exists() else ["-m", "setup"]
        return asked[asked[0] == f"{ROOT}/process/start.py" :]

    return ask


def split_variables(command: str) -> tuple[dict[str, str], list[str]]:
    """NAME=value ... in front of a command, and its words."""
    words = shlex.split(command, comments=True)
    count = next(i for i, word in enumerate(words) if not re.match(r"\w+=", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def program(command: str, ask) -> tuple[str, list[str]]:
    """(module, its arguments) of one rank."""
    variables, (starter, *words) = split_variables(command)
    if starter == "bash":
        assert words[0] == "launch.sh"
        words = ask(words[1:], variables)
    if starter == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    if words[0] == f"{ROOT}/tools/launch.py":
        words = ["-m", "tools.launch", *words[1:]]
    if words[:2] in (["-m", "torch.distributed.run"], ["-m", "tools.launch"]):
        args = parse_args(words[2:])
        words = ["-m"] * args.module + [args.training_script, *args.training_script_args]
    if words[0] == "-m":
        return words[1], words[2:]
    path = ROOT / words[0]
    assert path.is_file(), f"{words[0]}: no such file"
    if path.stem == "__main__":
        return path.parent.name, words[1:]
    return f"{path.parent.name}.{path.stem}" if path.parent.name in ("tools", "generate") else path.stem, words[1:]


def main_of(name: str, argv: list[str], monkeypatch) -> int:
    """The exit status of a module's command."""
    main = importlib.import_module(f"{name}.__main__" if name in PACKAGES else name).main
    monkeypatch.setattr(sys, "argv", [name, *argv])
    try:
        return main(argv) or 0 if inspect.signature(main).parameters else main() or 0
    except SystemExit as end:  # --help
        return end.code or 0


def products(name: str, argv: list[str]) -> list[Path]:
    """What a command says it makes."""
    made = [Path(value) for flag, value in pairwise(argv) if flag in ("--out", "--report")]
    if name.startswith("train") and "--output_dir" in argv:
        output_dir = Path(argv[argv.index("--output_dir") + 1])
        made += [output_dir / part for part in ("config.json", "metrics.jsonl", "checkpoints/step_2", "final")]
    if name in MAKES_ITS_LAST_NAME:
        flags = [i for i, word in enumerate(argv) if word.startswith("--")]
        made.append(Path(argv[min(flags, default=len(argv)) - 1]))
    return made


# ---- the desk


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Faster for what is so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, toys, loud_dir, codec_files, judges, talking_whisper) -> Path:
    """What README's reader has: recordings/ of one speaker, manifests, a base checkpoint, a codec, and a run that went wrong."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "recordings" / "anna").mkdir(parents=True)
    for index in range(1, 21):
        write_wav(folder / "recordings" / "anna" / f"{index:03}.wav", 0.2, seed=index)
        (folder / "recordings" / "anna" / f"{index:03}.txt").write_text(f"line {index:03}")
    (folder / "calls").mkdir()
    write_wav(folder / "calls" / "one.wav", 2.0)
    soundfile.write(folder / "talk.wav", talk(-0.5, 7, -1, 8, -1, 7, -0.5), 24000)
    said = [{"start": n / 4, "end": n / 4 + 0.2, "text": f"line {n}", "speaker": f"SPEAKER_0{n % 2}"} for n in range(8)]
    (folder / "calls" / "one.json").write_text(json.dumps({"segments": said}))
    records = (toys / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(records * 2)
    (folder / "val.jsonl").write_text("".join(records.splitlines(keepends=True)[:2]))
    for name, target in {
        "clips": toys / "clips",
        "checkpoint": loud_dir,
        "codec": codec_files,
        "recogniser": judges[0],
        "whisper": talking_whisper,
        "bosonai": codec_files / "bosonai",
        "recipes": ROOT / "recipes",
    }.items():
        (folder / name).symlink_to(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        spoilt = f"--train_manifest train.jsonl --output_dir runs/spoilt --lr 1e30 {APPENDED['train']}"
        assert train.main(spoilt.split()) == 0
        torch.distributed.destroy_process_group()
    return folder


@pytest.fixture()
def at_desk(desk, monkeypatch) -> Path:
    monkeypatch.chdir(desk)
    return desk


def prepare(command: str) -> str:
    for example, ours in SUBSTITUTED.items():
        command = command.replace(example, ours)
    return command


# ---- the tests


def is_slow(command: str) -> bool:
    """A plan takes 20 s; one is made in test_plan.py."""
    return command.startswith("bash launch.sh plan")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if is_slow(command) else ())
        for command in COMMANDS
        if command not in OF_SEVERAL_NODES
    ],
)
def test_command(command, asked_of_python, at_desk, monkeypatch, capsys):
    """Exit status 0, and what it says it makes is there."""
    name, argv = program(prepare(command), asked_of_python)
    if name in RUN_BY_CI:
        lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
        assert name in {program(line, asked_of_python)[0] for line in lines if line.startswith("bash launch.sh")}
        return
    if name != "train" and argv and f"{name} {argv[0]}" in APPENDED | dict.fromkeys(MAKES_ITS_LAST_NAME):
        name, argv = f"{name} {argv[0]}", argv[1:]
    if name == "train" and "--output_dir" in argv:  # README gives several ways to make the same run
        shutil.rmtree(argv[argv.index("--output_dir") + 1], ignore_errors=True)
    if name == "train" and argv != ["--help"]:
        parse_config(argv)  # README's own values, some of which are replaced below
    made = products(name, argv)
    module, *subcommand = name.split()
    status = main_of(module, [*subcommand, *argv, *APPENDED.get(name, "").split()], monkeypatch)
    error = capsys.readouterr().err
    if "--base_ckpt MODEL" in command:  # the desk's model is random
        assert status == 2 and "the model has not learnt to speak" in error
        return
    assert status == 0, error
    for path in made:
        assert path.exists() and (path.is_dir() or path.stat().st_size > 100), path


def run_for_real(command: str, desk: Path, venv: Path, **variables: str) -> subprocess.Popen:
    given, words = split_variables(prepare(command))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "VENV": str(venv), **given, **variables}
    words = ["bash", str(ROOT / "launch.sh"), *words[2:], *APPENDED["train"].split()]
    return subprocess.Popen(words, env=environment, cwd=desk, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(launched: subprocess.Popen) -> str:
    try:
        _, err = launched.communicate(timeout=180)
    finally:
        launched.kill()
    assert launched.returncode == 0, err
    return err


@pytest.fixture(scope="module")
def this_environment(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("this") / "venv", f'exec "{sys.executable}" "$@"')


def test_two_ranks_for_real(desk, this_environment):
    (command,) = (command for command in COMMANDS if "--use_gradient_checkpointing" in command)
    shutil.rmtree(desk / "runs" / "voice", ignore_errors=True)
    finish(run_for_real(command, desk, this_environment, NPROC="2"))
    config = json.loads((desk / "runs/voice/config.json").read_text())
    assert (config["mixed_precision"], config["activation_checkpointing"], config["lora_r"]) == ("bf16", "full", 64)
    lines = [json.loads(line) for line in (desk / "runs/voice/metrics.jsonl").read_text().splitlines()]
    assert config["world_size"] == 2 and all(math.isfinite(line["loss"]) for line in lines if line["split"] == "train")


def test_two_nodes_for_real(desk, this_environment):
    """Two launchers with a rank each, the second line on a second node."""
    assert len(OF_SEVERAL_NODES) == 2
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    nodes = [run_for_real(command, desk, this_environment, NPROC="1", MASTER_PORT=str(port)) for command in OF_SEVERAL_NODES]
    for node in nodes:
        finish(node)
    assert json.loads((desk / "runs/nodes/config.json").read_text())["world_size"] == 2
    assert (desk / "runs/nodes/final/adapter_model.safetensors").is_file()


def test_what_launch_sh_starts(asked_of_python):
    """Files by their path: `python -m` would look for modules in the current folder first."""
    for words, started in {
        "": "ROOT/tools/demo.py",
        "demo --steps 3": "ROOT/tools/demo.py --steps 3",
        "prepare check x": "ROOT/prepare/__main__.py check x",
        "prepare encode x": "ROOT/prepare/__main__.py encode x",
        "generate --text x": "ROOT/generate/__main__.py --text x",
        "generate --lines x": "ROOT/generate/__main__.py --lines x",
        "evaluate --ckpt x": "ROOT/generate/evaluate.py --ckpt x",
        "merge a b": "ROOT/export/__main__.py merge a b",
        "show a": "ROOT/export/__main__.py show a",
        "plan": "ROOT/tools/plan.py",
        "voice talk.m4a --name anna": "ROOT/tools/voice.py talk.m4a --name anna",
        "report runs/voice": "ROOT/tools/report.py runs/voice",
        "replay file": "ROOT/tools/replay.py file",
        "bench step --size mini": "ROOT/benchmarks/step.py --size mini",
        "test": "-m pytest -n 1 --dist loadfile --no-loadscope-reorder tests/",  # nproc obeys OMP_NUM_THREADS
        "test tests/test_loss.py -k x": "-m pytest tests/test_loss.py -k x",
        "setup": "-m setup",
    }.items():
        assert asked_of_python(words.split(), {}) == started.replace("ROOT", str(ROOT)).split(), words
    flags = asked_of_python(["--lr", "1"], {"NPROC": "2", "LORA_R": "4"})
    assert flags[0] == f"{ROOT}/tools/launch.py" and flags[-5:] == [f"{ROOT}/train.py", "--lora_r", "4", "--lr", "1"]
    assert "--nproc_per_node=2" in flags and flags == asked_of_python(["train", "--lr", "1"], {"NPROC": "2", "LORA_R": "4"})


@pytest.mark.parametrize("variables", [{"NPROC": "2"}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_every_gpu_of_the_node_works(variables, asked_of_python):
    """Where ranks share the work; what one process does is left to one."""
    ranks = [f"{ROOT}/tools/launch.py", "--nproc_per_node=2", "--standalone"]
    for words, file in {
        "prepare encode x --out y": "prepare/__main__.py encode x --out y",
        "generate --ckpt a --lines x": "generate/__main__.py --ckpt a --lines x",
        "generate --lines=x": "generate/__main__.py --lines=x",
        "evaluate --ckpt a": "generate/evaluate.py --ckpt a",
    }.items():
        assert asked_of_python(words.split(), variables) == [*ranks, *f"{ROOT}/{file}".split()]
    for words in ("prepare check x", "generate --text x", "export a b"):
        assert asked_of_python(words.split(), variables)[0] == f"{ROOT}/{words.split()[0]}/__main__.py"


def test_code_in_the_current_folder_does_not_run(at_desk, tmp_path, monkeypatch):
    """A data set may hold a config.py, or a folder called tools: nothing of it is imported, by no process of a run either."""
    for name in ("config", "data", "common", "tools/launch", "tools/__init__", "prepare/__init__", "sitecustomize", "random"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + chr(10))")
    monkeypatch.chdir(tmp_path)
    venv = make_environment(tmp_path / "venv", f'exec "{sys.executable}" "$@"')
    train = f"--train_manifest {at_desk}/train.jsonl --output_dir {tmp_path}/o --base_ckpt {at_desk}/checkpoint --max_steps 1"
    train += " --audio_tokenizer none --device cpu --batch_size 1 --num_workers 1 --sample_steps 0"
    for words in (train, f"prepare check {at_desk}/val.jsonl"):
        done = launch_sh(words.split(), {"VENV": str(venv), "NPROC": "1"})
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_what_only_evaluate_needs_is_installed_when_it_is_used(tmp_path):
    venv = make_environment(tmp_path / "venv", f"""echo "$@" >>'{tmp_path}/asked'""")
    (venv / ".installed-evaluate").unlink()
    for words in ("generate --text x", "evaluate --ckpt x", "evaluate --ckpt y"):
        assert launch_sh(words.split(), {"VENV": str(venv)}).returncode == 0
    generate, install, *evaluate = (tmp_path / "asked").read_text().splitlines()
    assert generate.endswith("--text x") and [line.split()[-1] for line in evaluate] == ["x", "y"]
    assert install.startswith("-m pip install") and install.endswith(f"--requirement={ROOT}/requirements-evaluate.txt")


@pytest.mark.parametrize(
    "words",
    ["--train_manifest x --quantize nf4", "plan", "generate --ckpt x --quantize=nf4", "--config CARD", "--config=CARD.json"],
)
def test_what_only_nf4_needs_is_installed_when_it_is_used(words, tmp_path):
    (tmp_path / "card").write_text("lora_r: 16\nquantize: nf4  # why\n")
    (tmp_path / "card.json").write_text('{\n  "quantize": "nf4",\n  "seed": 0\n}')
    (tmp_path / "plain").write_text("quantize: none\n")
    words = words.replace("CARD", f"{tmp_path}/card")
    venv = make_environment(tmp_path / "venv", f"""echo "$@" >>'{tmp_path}/asked'""")
    (venv / ".installed-nf4").unlink()
    for line in ("show x", f"--config {tmp_path}/plain", words):
        assert launch_sh(line.split(), {"VENV": str(venv)}).returncode == 0
    show, _, install, _ = (tmp_path / "asked").read_text().splitlines()
    assert show.endswith("show x") and install.endswith(f"--requirement={ROOT}/requirements-nf4.txt")


def test_what_only_cut_needs_is_installed_when_it_is_used(tmp_path):
    venv = make_environment(tmp_path / "venv", f"""echo "$@" >>'{tmp_path}/asked'""")
    (venv / ".installed-voice").unlink()
    for line in ("prepare check x", "prepare transcribe x", "prepare cut x", "prepare cut y"):
        assert launch_sh(line.split(), {"VENV": str(venv)}).returncode == 0
    *_, install, x, y = (tmp_path / "asked").read_text().splitlines()
    assert len(_) == 2 and x.endswith("cut x") and y.endswith("cut y")
    assert install.startswith("-m pip install") and install.endswith(f"--requirement={ROOT}/requirements-voice.txt")


def test_launch_sh_refuses_what_it_does_not_know(tmp_path):
    """Before anything is set up."""
    for words, message in {
        "trian --lr 1": "error: launch.sh knows no 'trian'; it knows train, ",
        "train.jsonl": "error: launch.sh knows no 'train.jsonl'",
        "bench": "error: no benchmark ''; there are: batched large_manifest load save step transcripts",
        "bench setp": "error: no benchmark 'setp'",
    }.items():
        done = launch_sh(words.split(), {"VENV": str(tmp_path / "venv")})
        assert done.returncode == 2 and done.stderr.startswith(message) and not done.stdout, words
    for variable, value in {"NPROC": f"a[$(touch {tmp_path}/ran)]", "NNODES": "two", "MAX_RESTARTS": "-1"}.items():
        done = launch_sh(["--lr", "1"], {"VENV": str(tmp_path / "venv"), variable: value})
        assert done.returncode == 2 and done.stderr == f"error: {variable}={value}: expected a number\n"
    assert not list(tmp_path.iterdir())


def test_extraction():
    text = "Say `python a.py\nx`, `torchrun` or\n```\nA=1 bash launch.sh \\\n    y  # why\ntree.py  what it is\n```\n| `bash launch.sh` | `--x` |"
    assert commands(text) == ["python a.py x", "A=1 bash launch.sh y # why", "bash launch.sh"]
    assert len(COMMANDS) > 40 and "bash launch.sh" in COMMANDS


def test_every_page_is_read_and_links_to_what_exists():
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    others = {"docs/faults.md", "docs/mistakes.md", "docs/card.md"}  # commands that go wrong, and those that test_export.py runs
    assert {*pages} == {*PAGES, *others}
    titles = {page: re.findall(r"^#+ (.*)", (ROOT / page).read_text(), re.MULTILINE) for page in pages}
    headings = {page: [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in titles[page]] for page in pages}
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text()):
            path, _, heading = target.partition("#")
            linked = (ROOT / page).parent / path if path else ROOT / page
            assert linked.exists(), f"{page}: {target}"
            assert not heading or heading in headings[linked.resolve().relative_to(ROOT).as_posix()], f"{page}: {target}"


@pytest.mark.parametrize(("page", "least"), [("faults", 60), ("cuda", 10), ("how-it-works", 10)])
def test_tables_name_tests_that_exist(page, least):
    named = re.findall(r"`(?:(?:tests/)?(test_\w+\.py))?(?:::(\w+))?`", (ROOT / "docs" / f"{page}.md").read_text())
    file, missing = None, []
    for path, test in named:
        file = path or file
        if path or test:
            source = (ROOT / "tests" / file).read_text()
            missing += [f"{file}::{test}"] * bool(test and f"def {test}(" not in source)
    assert len(named) >= least and not missing
