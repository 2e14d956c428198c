"""Hostile files: each command says in one line what is wrong with them, with status 2, and with the memory of a good file.

All cases run one after the other in one process, which notes the status, the message and the peak memory of each.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ONLY_STEPS, ROOT, _context
from safetensors.torch import save_file

from prepare.audio import read_waveform
from prepare.codes_cache import CLIP
from prepare.manifest import AudioPart

TERABYTE = 10**12
MAX_GROWTH_BYTES = 300e6
LIMIT_SEC = 60  # of a case; some would take hours
DEEP = "[" * 100_000 + "]" * 100_000
SECRET = "login secret password hunter2"


class Evil:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def wave(folder: Path, name: str = "a.wav", rate: int = 24000, sec: float = 1.0, channels: int = 1, **how) -> Path:
    noise = 0.1 * np.random.default_rng(0).standard_normal((round(rate * sec), channels))
    soundfile.write(folder / name, noise, rate, **how)
    return folder / name


def patched(path: Path, at: int | bytes, content: bytes) -> Path:
    """The file with other bytes from a position, or after a mark, on."""
    data = bytearray(path.read_bytes())
    at = at if isinstance(at, int) else data.index(at) + len(at)
    data[at : at + len(content)] = content
    path.write_bytes(data)
    return path


def sparse(path: Path, size: int = TERABYTE, content: bytes = b"") -> Path:
    path.write_bytes(content)
    os.truncate(path, size)
    return path


def record(**audio) -> dict:
    turn = {"role": "assistant", "content": {"type": "audio", **audio}}
    return {"messages": [{"role": "user", "content": "x"}, turn]}


def manifest(folder: Path, value: object) -> Path:
    path = folder / "m.jsonl"
    path.write_text(value if isinstance(value, str) else json.dumps(value) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Audio: a manifest is encoded that names it


def raw(path: Path) -> dict:
    content = base64.b64encode(path.read_bytes()).decode()
    path.unlink()
    return {"audio_url": "", "raw_audio": content}


def wav_of(folder: Path, block: np.ndarray, count: int = 1, **how) -> Path:
    with soundfile.SoundFile(folder / "a.wav", "w", 24000, 1, **{"format": "WAV", **how}) as file:
        for _ in range(count):
            file.write(block)
    return folder / "a.wav"


def special(folder: Path, kind: str) -> Path:
    path = folder / "a.wav"
    make = {"pipe": os.mkfifo, "folder": Path.mkdir, "loop": lambda p: p.symlink_to(p.name), "device": link_to("/dev/zero")}
    (make | {"process": link_to("/proc/self/environ"), "empty": Path.touch})[kind](path)
    return path


def link_to(target: str | Path):
    return lambda path: path.symlink_to(target)


SILENCE = np.zeros(24000, np.int16)
FLAC_TOTAL = 8 + 13  # 36 bits, of which the lowest 4 of this byte are the first
AUDIO = {
    "WAV that promises 1 GB": lambda d: patched(wave(d), 4, struct.pack("<I", 2**30)),
    "WAV of one sample per second": lambda d: patched(wave(d), 24, struct.pack("<I", 1)),
    "WAV of two thousand million samples per second": lambda d: patched(wave(d), 24, struct.pack("<I", 2**31 - 1)),
    "WAV of 1000 channels": lambda d: wave(d, channels=1000, sec=0.1),
    "CAF of one sample per second": lambda d: patched(wave(d, format="CAF"), b"desc" + bytes(7) + b"\x20", struct.pack(">d", 1)),
    "AU of one sample per second": lambda d: patched(wave(d, format="AU"), 16, struct.pack(">I", 1)),
    "FLAC that promises a month": lambda d: patched(wave(d, "a.flac"), FLAC_TOTAL, b"\xff" * 5),
    "FLAC of an hour of silence": lambda d: wav_of(d, SILENCE, 3600, format="FLAC"),
    "Ogg of 17 minutes of silence": lambda d: wav_of(d, SILENCE, 17 * 60, format="OGG"),
    "MP3 that is noise": lambda d: (d / "a.mp3").write_bytes(b"\xff\xfb\x90\x00" + os.urandom(5000)) and d / "a.mp3",
    "not a number": lambda d: wav_of(d, np.full(24000, np.nan), subtype="FLOAT"),
    "infinite": lambda d: wav_of(d, np.full(24000, np.inf), subtype="FLOAT"),
    "a terabyte of zeros": lambda d: sparse(d / "a.wav"),
    "a terabyte of samples": lambda d: sparse(wave(d, "a.wav"), TERABYTE, wave(d).read_bytes()),
    "an empty file": lambda d: special(d, "empty"),
    "a pipe": lambda d: special(d, "pipe"),
    "a folder": lambda d: special(d, "folder"),
    "a link to itself": lambda d: special(d, "loop"),
    "a device": lambda d: special(d, "device"),
    "the environment of the process": lambda d: special(d, "process"),
    "in the record: one sample per second": lambda d: raw(patched(wave(d), 24, struct.pack("<I", 1))),
    "in the record: a text": lambda d: {"audio_url": "", "raw_audio": base64.b64encode(b"no audio").decode()},
    "a name of 100,000 letters": lambda d: {"audio_url": "a" * 100_000},
    "a name with a zero": lambda d: {"audio_url": "a\0.wav"},
    "an offset of 10 ** 400 seconds": lambda d: {"audio_url": str(wave(d)), "offset": 10**400},
}


def npy(folder: Path, header: str, version: int = 1, length: int | None = None) -> Path:
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    (folder / "a.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + text + bytes(800))
    return folder / "a.npy"


def shaped(shape: str, descr: str = "'<i8'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


def safetensors(folder: Path, header: object, length: int | None = None) -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(800))
    return path


def as_npy(folder: Path, write) -> Path:
    with open(folder / "a.npy", "wb") as file:
        write(file)
    return folder / "a.npy"


CODES = {
    "objects": lambda d: as_npy(d, lambda file: np.save(file, np.array([[Evil()]]), allow_pickle=True)),
    "a pickle": lambda d: as_npy(d, lambda file: pickle.dump(Evil(), file)),
    "a zip file": lambda d: as_npy(d, lambda file: np.savez_compressed(file, a=np.zeros((8, 10**6), np.int64))),
    "a shape of terabytes": lambda d: npy(d, shaped("(8, 1000000000000)")),
    "a shape beyond 64 bits": lambda d: npy(d, shaped("(8, 99999999999999999999)")),
    "a negative shape": lambda d: npy(d, shaped("(-8, -10)")),
    "no dimension": lambda d: npy(d, shaped("()")),
    "a header of code": lambda d: npy(d, "__import__('os').mkdir('executed')"),
    "a deep header": lambda d: npy(d, "(" * 9000 + ")" * 9000, version=2),
    "a header of 4 GB": lambda d: sparse(npy(d, shaped("(8, 10)"), 2, 2**32 - 1), 2**33, (d / "a.npy").read_bytes()),
    "numbers with a point": lambda d: as_npy(d, lambda file: np.save(file, np.zeros((8, 10)))),
    "fields": lambda d: npy(d, shaped("(8, 10)", "[('a', '<i4'), ('b', '<i4')]")),
    "a gigabyte of codes": lambda d: sparse(npy(d, shaped("(8, 20000000)")), 10**9, (d / "a.npy").read_bytes()),
    "safetensors: a header of exabytes": lambda d: safetensors(d, {}, 2**63),
    "safetensors: a deep header": lambda d: safetensors(d, DEEP.encode()),
    "safetensors: a shape beyond the file": lambda d: safetensors(
        d, {"a": {"dtype": "I64", "shape": [8, 2**60], "data_offsets": [0, 800]}}
    ),
    "safetensors: two tensors": lambda d: save_file({"a": torch.zeros(8, 9), "b": torch.zeros(1)}, d / "a.safetensors")
    or d / "a.safetensors",
}


# ---------------------------------------------------------------------------------------------------------------------
# Texts and tables: they are converted


def table(folder: Path, text_file: str | Path) -> Path:
    wave(folder)
    return manifest(folder, {"audio": "a.wav", "text_file": str(text_file)})


def linked_table(folder: Path, target: str | Path) -> Path:
    (folder / "a.txt").symlink_to(target)
    return table(folder, "a.txt")


def secret(folder: Path, content: str = SECRET) -> Path:
    path = folder.parent / f"{folder.name} secret"
    path.write_text(content)
    return path


def beside(folder: Path, name: str, make) -> Path:
    """A folder of a clip and a file beside it."""
    wave(folder)
    make(folder / name)
    return folder


def kaldi(folder: Path) -> Path:
    wave(folder)
    (folder / "wav.scp").write_text("login a.wav\n")
    (folder / "text").symlink_to(secret(folder))
    return folder


def loops(folder: Path) -> Path:
    for name, target in (("a", "../b"), ("b", "../a")):
        (folder / name).mkdir()
        for number in range(10):
            (folder / name / str(number)).symlink_to(target)
    return folder


def tar(folder: Path, **about) -> Path:
    """A shard with one member, whose header says something else."""
    info = tarfile.TarInfo("a.wav")
    for name, value in about.items():
        setattr(info, name, value)
    (folder / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    return folder / "a.tar"


def gz(folder: Path, content: bytes, cut: int = 0) -> Path:
    packed = gzip.compress(content, 1)
    (folder / "a.jsonl.gz").write_bytes(packed[: len(packed) - cut])
    return folder / "a.jsonl.gz"


def text_in(folder: Path, name: str, text: str) -> Path:
    wave(folder)
    (folder / name).write_text(text)
    return folder / name


def of_part(**part) -> dict:
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": part}]}


CUT = '{"recording": {"sources": [{"type": "file", "source": "a.wav"}]}, "supervisions": []}\n'
GRID = 'File type = "ooTextFile"\n"IntervalTier" "a" 0 1 1000000000000 0 1 "some words here"'
TEXTS = {
    "text_file: the environment": lambda d: table(d, "/proc/self/environ"),
    "text_file: a link to the environment": lambda d: linked_table(d, "/proc/self/environ"),
    "text_file: a link out of the folder": lambda d: linked_table(d, secret(d)),
    "text_file: above the folder": lambda d: table(d, f"../{secret(d).name}"),
    "text_file: a device": lambda d: linked_table(d, "/dev/zero"),
    "text_file: a pipe": lambda d: os.mkfifo(d / "p.txt") or table(d, "p.txt"),
    "text_file: a terabyte": lambda d: table(d, sparse(d / "a.txt").name),
    "text_file: a folder of links": lambda d: (d / "sub").symlink_to("/proc/self") or table(d, "sub/environ"),
    "folder: a text that is a link": lambda d: beside(d, "a.txt", link_to(secret(d))),
    "folder: JSON that is a link": lambda d: beside(d, "a.json", link_to(secret(d, json.dumps({"text": SECRET})))),
    "folder: a table that is a link": lambda d: beside(d, "metadata.csv", link_to(secret(d, f"a|{SECRET}"))),
    "folder: a table that is a pipe": lambda d: beside(d, "metadata.csv", os.mkfifo),
    "folder: JSONL that is a pipe": lambda d: beside(d, "metadata.jsonl", os.mkfifo),
    "folder: subtitles that are a pipe": lambda d: beside(d, "a.srt", os.mkfifo),
    "folder: a shard that is a pipe": lambda d: beside(d, "a.tar", os.mkfifo),
    "folder: a table that is a device": lambda d: beside(d, "metadata.csv", link_to("/dev/zero")),
    "folder: a link to the whole disk": lambda d: beside(d, "all", link_to("/")),
    "folder: links that go round": loops,
    "folder: a table of a terabyte": lambda d: beside(d, "metadata.csv", sparse),
    "Kaldi: a text that is a link": kaldi,
    "deep JSON beside a clip": lambda d: beside(d, "a.json", lambda p: p.write_text(DEEP)),
    "deep JSON": lambda d: manifest(d, DEEP),
    "a deep list": lambda d: manifest(d, "[\n" + DEEP + "\n]"),
    "a deep row": lambda d: manifest(d, '{"audio": "a.wav", "text": ' + DEEP + "}\n"),
    "a deep cut of Lhotse": lambda d: manifest(d, CUT + '{"recording": ' + DEEP + ', "supervisions": []}\n'),
    "a number of 10,000 digits": lambda d: manifest(d, '{"messages": ' + "9" * 10_000 + "}\n"),
    "a record of a terabyte": lambda d: sparse(d / "m.jsonl"),
    "a list of a terabyte": lambda d: sparse(d / "m.json", TERABYTE, b"[{"),
    "JSON whose messages are a number": lambda d: manifest(d, {"messages": 5}),
    "gzip: a line of 300 MB": lambda d: gz(d, b" " * 300_000_000),
    "gzip: cut off": lambda d: gz(d, CUT.encode() * 1000, cut=20),
    "gzip: no gzip": lambda d: (d / "a.jsonl.gz").write_bytes(b"no gzip") and d / "a.jsonl.gz",
    "tar: a member of a terabyte": lambda d: tar(d, size=TERABYTE),
    "tar: no tar": lambda d: (d / "a.tar").write_bytes(os.urandom(5000)) and d / "a.tar",
    "TextGrid of a million million intervals": lambda d: text_in(d, "a.TextGrid", GRID),
    "subtitles of 200,000 digits": lambda d: text_in(d, "a.srt", "1" * 200_000 + "\n"),
    "seconds of a million colons": lambda d: text_in(d, "m.csv", f"audio,text,start\na.wav,x,{'1:' * 50_000}1\n"),
    "seconds that are no number": lambda d: text_in(d, "m.csv", "audio,text,start\na.wav,x,inf\n"),
    "a quote that never ends": lambda d: text_in(d, "m.csv", 'audio,text\na.wav,"' + "x" * 200_000),
    "texts that take a day to compare": lambda d: text_in(
        d, "m.txt", "".join(f"a.wav|{i} {'ab' * 60_000}, {i}.|{'ba ' * 40_000}{i}|{'abc ' * 9}\n" for i in range(5))
    ),
    "bytes that are no text": lambda d: (d / "m.csv").write_bytes(b"audio,text\n\xff\xfe\xff,x\n") and d / "m.csv",
}


# ---------------------------------------------------------------------------------------------------------------------
# Codec, cache and models


def codec(folder: Path, good: Path, **files) -> Path:
    """The codec with another config.json or model.pth."""
    path = folder / "codec"
    path.mkdir()
    contents = {"config.json": files.get("config"), "model.pth": files.get("model")}
    for name, content in contents.items():
        if isinstance(content, dict):
            content = json.dumps(json.loads((good / name).read_text()) | content).encode()
        (path / name).symlink_to(good / name) if content is None else (path / name).write_bytes(content)
    return path


def bomb(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


CODECS = {
    "deep JSON": lambda d, good: codec(d, good, config=DEEP.encode()),
    "no strides": lambda d, good: codec(d, good, config={"ratios": [0, 0]}),
    "a million codes": lambda d, good: codec(d, good, config={"bins": 10**6}),
    "a pickle that runs a command": lambda d, good: codec(d, good, model=pickle.dumps(Evil())),
    "a zip file that is cut off": lambda d, good: codec(d, good, model=bomb("a", bytes(10**6))[:-30]),
    "a zip file of something else": lambda d, good: codec(d, good, model=bomb("archive/data.pkl", pickle.dumps(Evil()))),
}


def cache(folder: Path, good: Path, damage) -> Path:
    """A copy of a cache of codes, damaged."""
    path = folder / "codes"
    shutil.copytree(good, path)
    damage(path)
    return path


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def frames(path: Path, **values) -> None:
    rows = np.frombuffer(path.read_bytes(), CLIP).copy()
    for name, value in values.items():
        rows[name] = value
    path.write_bytes(rows.tobytes())


CACHES = {
    "no JSON": lambda c: only(c, "*/codec.json").write_text("{"),
    "deep JSON": lambda c: only(c, "*/codec.json").write_text(DEEP),
    "a note that leads elsewhere": lambda c: only(c, "*/codec.json").write_text(
        only(c, "*/codec.json").read_text().replace('"identity": "', '"identity": "../')
    ),
    "an index of a terabyte": lambda c: sparse(only(c, "*/*.clips")),
    "an index that is a pipe": lambda c: os.mkfifo(c / only(c, "*/*.clips").parent.name / "x.clips"),
    "four thousand million frames": lambda c: frames(only(c, "*/*.clips"), num_frames=2**32 - 1),
    "an offset of exabytes": lambda c: frames(only(c, "*/*.clips"), offset=2**64 - 1),
    "codes that are gone": lambda c: only(c, "*/*.codes").unlink(),
    "codes that are cut off": lambda c: os.truncate(only(c, "*/*.codes"), 10),
}


def model(folder: Path, good: Path, change) -> Path:
    path = folder / "model"
    shutil.copytree(good, path)
    change(path)
    return path


def settings_of(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def own_code(path: Path) -> None:
    """A tokenizer that brings its own class."""
    (path / "evil.py").write_text("import os\nos.mkdir('executed')\nclass Evil: pass\n")
    classes = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    settings_of(path / "tokenizer_config.json", **classes)


MODELS = {
    "deep config": lambda m: (m / "config.json").write_text(DEEP),
    "a config that is a list": lambda m: (m / "config.json").write_text("[]"),
    "a config of nonsense": lambda m: settings_of(m / "config.json", text_config=[5]),
    "a tokenizer with code": own_code,
    "deep tokenizer settings": lambda m: (m / "tokenizer_config.json").write_text(DEEP),
    "an index that leads elsewhere": lambda m: (m / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../../../etc/passwd"}})
    ),
    "a deep index": lambda m: (m / "model.safetensors.index.json").write_text(DEEP),
    "weights that are a pickle": lambda m: (m / "model.safetensors").write_bytes(pickle.dumps(Evil())),
    "weights that are cut off": lambda m: os.truncate(m / "model.safetensors", 1000),
    "an adapter of nonsense": lambda m: (m / "adapter_config.json").write_text('{"peft_type": "LORA", "r": {}}'),
    "a deep adapter": lambda m: (m / "adapter_config.json").write_text(DEEP),
}


def with_checksum(state: dict) -> str:
    rest = {name: value for name, value in state.items() if name != "sha256"}
    return json.dumps(rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()})


def state(**values):
    """A change of state.json by someone who can compute checksums."""

    def change(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(with_checksum(json.loads(path.read_text()) | values))

    return change


STATES = {
    "deep JSON": lambda s: (s / "state.json").write_text(DEEP),
    "a list": lambda s: (s / "state.json").write_text("[]"),
    "a file elsewhere": state(files={"../../../etc/passwd": {"bytes": 1, "sha256": ""}}),
    "files without sizes": state(files={"a.safetensors": 5}),
    "no position": state(position=None),
    "settings that are a list": state(run=[1, 2]),
    "losses that are a word": state(losses="words"),
    "a base without fingerprint": state(base=5),
}


# ---------------------------------------------------------------------------------------------------------------------
# Running them

NAMES = [
    *(f"audio: {name}" for name in AUDIO),
    *(f"codes: {name}" for name in CODES),
    *(f"text: {name}" for name in TEXTS),
    *(f"codec: {name}" for name in CODECS),
    *(f"cache: {name}" for name in CACHES),
    *(f"model: {name}" for name in MODELS),
    *(f"state: {name}" for name in STATES),
]


def command(kind: str, name: str, folder: Path, good: Path, toys: Path) -> tuple[str, list]:
    """(program, arguments) of a case, whose files are made in `folder`."""
    codec_flags = ["--audio_tokenizer", good / "codec"]
    if kind == "audio":
        made = AUDIO[name](folder)
        path = manifest(folder, record(**(made if isinstance(made, dict) else {"audio_url": str(made)})))
        return "prepare", ["encode", path, "--out", folder / "codes", *codec_flags]
    if kind == "codes":
        path = manifest(folder, record(audio_url=str(CODES[name](folder))))
        return "prepare", ["show", path, 0, "--base_ckpt", toys / "checkpoint"]
    if kind == "text":
        return "prepare", ["convert", TEXTS[name](folder), folder / "out" / "o.jsonl"]
    if kind == "codec":
        path = CODECS[name](folder, good / "codec")
        return "prepare", ["encode", good / "m.jsonl", "--out", folder / "codes", "--audio_tokenizer", path]
    if kind == "cache":
        path = cache(folder, good / "codes", CACHES[name])
        about = ["--base_ckpt", toys / "checkpoint", "--codes_dir", path, "--audio_tokenizer", "the/codec"]
        return "prepare", ["show", good / "m.jsonl", 0, *about]
    if kind == "model":
        return "export", ["show", model(folder, toys / "checkpoint", MODELS[name])]
    run = folder / "run"
    shutil.copytree(good / "run", run)
    STATES[name](run / "checkpoints" / "step_1")
    return "train", training(toys, run, "--max_steps", 2, "--resume", run / "checkpoints" / "step_1")


def training(toys: Path, output_dir: Path, *more) -> list:
    flags = {"train_manifest": toys / "train.jsonl", "base_ckpt": toys / "checkpoint", "output_dir": output_dir}
    flags |= ONLY_STEPS | {"device": "cpu", "num_workers": 0, "save_steps": 1, "batch_size": 1, "lora_r": 2, "audio_tokenizer": "none"}
    return [*(item for name, value in flags.items() for item in (f"--{name}", value)), *more]


def call(program: str, arguments: list) -> tuple[int, str, int]:
    """(status, what it said, peak memory in bytes until now) of a command in this process."""
    import export.__main__
    import prepare.__main__
    import train

    mains = {"prepare": prepare.__main__.main, "export": export.__main__.main, "train": train.main}
    said = io.StringIO()
    signal.alarm(LIMIT_SEC)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = mains[program](list(map(str, arguments)))
    except BaseException as error:
        status = repr(error)
    signal.alarm(0)
    return status, said.getvalue(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_all(connection, folder: Path, codec_files: Path, toys: Path) -> None:
    """In a process of its own: first every command on good files, then all cases."""

    def give_up(*_):
        raise TimeoutError(f"no end within {LIMIT_SEC} s")

    signal.signal(signal.SIGALRM, give_up)
    torch.set_num_threads(1)
    os.chdir(codec_files)  # where its HuBERT is
    good = folder / "good"
    good.mkdir()
    shutil.copytree(codec_files, good / "codec")
    path = manifest(good, record(audio_url=str(wave(good, sec=5.0))))
    text_in(good, "m.csv", "audio,text\na.wav,some words\n")
    encode = ["encode", path, "--out", good / "codes", "--audio_tokenizer", good / "codec"]
    for program, arguments in (
        ("prepare", encode),
        ("prepare", ["convert", good / "m.csv", good / "out" / "o.jsonl"]),
        ("prepare", ["show", toys / "train.jsonl", 0, "--base_ckpt", toys / "checkpoint"]),
        ("export", ["show", toys / "checkpoint"]),
        ("train", training(toys, good / "run", "--max_steps", 1)),
    ):
        status, said, peak = call(program, arguments)
        assert status == 0, said
    note = only(good / "codes", "*/codec.json")  # a codec that is not here, known by the cache's own note
    note.write_text(json.dumps(json.loads(note.read_text()) | {"names": ["the/codec"]}))
    connection.send(("good", 0, "", peak))
    for number, name in enumerate(NAMES):
        here = folder / str(number)
        here.mkdir()
        kind, _, rest = name.partition(": ")
        connection.send((name, *call(*command(kind, rest, here, good, toys))))
        if (executed := Path("executed")).exists():
            connection.send((name, "its code was executed", "", 0))
            executed.rmdir()
        shutil.rmtree(here, ignore_errors=True)
    connection.send(None)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, codec_files, toys) -> dict[str, tuple]:
    """(status, message, growth of the peak memory in bytes) of each case."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=run_all, args=(sender, tmp_path_factory.mktemp("hostile"), codec_files, toys))
    process.start()
    sender.close()
    found, peak = {}, None
    try:
        while receiver.poll(2 * LIMIT_SEC) and (message := receiver.recv()):
            name, status, said, now = message
            if isinstance(found.get(name, (0,))[0], int):
                found[name] = status, said, now - (peak or now)
            peak = peak or now
    except EOFError:
        pass
    process.kill()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_one_line_and_status_2(name, outcomes):
    status, said, growth = outcomes[name]
    assert status == 2, f"{status}: {said}"
    message = said[said.index("error: ") :].strip()
    assert "\n" not in message and "Traceback" not in said, said
    assert len(message) < 2000 and "hunter2" not in said
    assert growth < MAX_GROWTH_BYTES, f"{growth / 1e6:.0f} MB more than with a good file"


def test_there_are_many():
    assert len(set(NAMES)) == len(NAMES) >= 40


# ---------------------------------------------------------------------------------------------------------------------
# What is allowed, and what is never run


def convert(*argv) -> int:
    import prepare.__main__

    return prepare.__main__.main(["convert", *map(str, argv)])


def test_other_folders_are_allowed_by_name(tmp_path, capsys):
    """A table whose texts are elsewhere, and a folder of links to another disk."""
    data, disk = tmp_path / "data", tmp_path / "disk"
    data.mkdir(), disk.mkdir()
    (disk / "a.txt").write_text("some words")
    path = table(data, disk / "a.txt")
    assert convert(path, tmp_path / "no.jsonl") == 2
    assert "leaves the dataset's folder" in capsys.readouterr().err
    assert convert(path, tmp_path / "one.jsonl", "--allow_outside", disk) == 0
    linked = tmp_path / "linked"
    linked.mkdir()
    wave(disk)
    (linked / "speaker").symlink_to(disk)
    assert convert(linked, tmp_path / "no.jsonl") == 2
    assert convert(linked, tmp_path / "two.jsonl", "--allow_outside", disk) == 0
    assert all("some words" in (tmp_path / name).read_text() for name in ("one.jsonl", "two.jsonl"))


def test_links_within_a_repository_of_the_hub_cache(tmp_path, capsys):
    """Its snapshots are links into blobs/; a link to the blobs of another repository leads outside."""
    hub = tmp_path / "hub"
    snapshot, blobs = (hub / "datasets--a--b" / name for name in ("snapshots/0123", "blobs"))
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "f00").write_text("some words")
    shutil.move(wave(tmp_path), blobs / "f01")
    (snapshot / "a.txt").symlink_to("../../blobs/f00")
    (snapshot / "a.wav").symlink_to("../../blobs/f01")
    assert convert(snapshot, tmp_path / "o.jsonl") == 0
    (hub / "models--c--d").mkdir()
    shutil.move(blobs / "f00", hub / "models--c--d" / "f00")
    (snapshot / "a.txt").unlink()
    (snapshot / "a.txt").symlink_to("../../../models--c--d/f00")
    assert convert(snapshot, tmp_path / "o.jsonl") == 2
    assert "leaves the dataset's folder" in capsys.readouterr().err


def test_long_files_are_decoded_in_blocks(tmp_path):
    """Ten minutes of eight channels: as much memory as the clip itself, not eight times as much."""
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 8000, 8, "PCM_16") as file:
        for _ in range(600):
            file.write(np.full((8000, 8), 1000, np.int16))
    part = AudioPart(tmp_path / "a.wav")
    tracemalloc.start()
    samples, rate = read_waveform(part, "record 0")
    size, peak = samples.nbytes, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(samples), rate) == (600 * 8000, 8000) and np.allclose(samples, 1000 / 2**15)
    assert peak < size + 20e6


# As modules of the standard library, of ours, and of packages that are imported by their short names.
STOLEN = ("json", "socket", "struct", "config", "common", "train", "data", "multiprocessing", "torch", "tools", "prepare", "tqdm")


@pytest.mark.parametrize(
    "how",
    ["tools", *(pytest.param(how, marks=pytest.mark.slow) for how in ("python train.py", "torchrun", "prepare"))],
)
def test_code_in_the_current_folder_is_never_run(how, toys, tmp_path):
    """Without launch.sh (test_readme.py), and whatever it is called: by the command, its ranks, the server of its workers."""
    here = tmp_path / "here"
    here.mkdir()
    for name in STOLEN:
        (here / name if name in ("tools", "prepare") else here).mkdir(exist_ok=True)
        path = here / name / "__init__.py" if name in ("tools", "prepare") else here / f"{name}.py"
        path.write_text(f"import os\nos.mkdir('{tmp_path}/executed')\n")
    flags = list(map(str, training(toys, tmp_path / "o", "--max_steps", 1, "--num_workers", 1)))
    commands = {
        "python train.py": [sys.executable, ROOT / "train.py", *flags],
        "torchrun": [Path(sys.executable).parent / "torchrun", "--standalone", ROOT / "train.py", *flags],
        "prepare": [sys.executable, ROOT / "prepare" / "__main__.py", "convert", toys / "train.jsonl", tmp_path / "x.jsonl"],
        "tools": [sys.executable, ROOT / "tools" / "plan.py", "--help"],
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(ROOT)} if how in ("prepare", "tools") else {}  # as launch.sh sets it
    done = subprocess.run(commands[how], cwd=here, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", ["$(touch executed)", "2;touch executed", "-1", "a[$(touch executed)]", ""])
def test_the_number_of_ranks_is_a_number(value, tmp_path):
    environment = {**os.environ, "NPROC": value, "VENV": str(tmp_path / "none"), "CUDA_VISIBLE_DEVICES": "a[$(touch executed)]"}
    command = ["bash", str(ROOT / "launch.sh"), "bench", "none"] if value == "" else ["bash", str(ROOT / "launch.sh"), "setup"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "executed").exists()
