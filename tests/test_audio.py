"""Waveforms become the official codec's codes, once: whatever happens to the process, the files or the codec."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import _context, run_ranks, write_manifest
from safetensors.torch import save_file
from test_codec import wave, write_wav

from common import DataError
from prepare import codes_cache, encode
from prepare.audio import AudioStore, CodecInfo, expected_frames, load_codec, read_waveform
from prepare.codes_cache import CacheWriter, CodesCache, digest
from prepare.manifest import AudioPart, Record
from process.command import says_errors


@pytest.fixture()
def codec(codec_dir):
    return load_codec(str(codec_dir), "cpu")


def clip(path: Path | None, offset: float | None = None, duration: float | None = None, raw: bytes | None = None) -> AudioPart:
    return AudioPart(path, offset, duration, True, "messages[1].content", raw_audio=raw)


def record(*clips: AudioPart) -> Record:
    return Record(None, list(clips), "record 0")


def open_store(cache_dir: Path, codec_dir: Path) -> AudioStore:
    return AudioStore(8, 64, 25.0, cache_dir, str(codec_dir))


def no_codec():
    raise AssertionError("the codec is not needed")


def dump(cache_dir: Path, codec_dir: Path) -> dict[bytes, bytes]:
    return {key: codes.tobytes() for key, codes in open_store(cache_dir, codec_dir).cache.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Codes


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [("a.wav", 24000, 1), ("a.wav", 44100, 2), ("a.flac", 16000, 2), ("a.ogg", 48000, 1), ("a.mp3", 8000, 2)],
)
def test_codes_are_the_codecs(name, rate, channels, codec, codec_dir, tmp_path):
    """Any format, rate and number of channels; a whole file, and a part of it."""
    path = tmp_path / name
    rng = np.random.default_rng(0)
    soundfile.write(path, 0.2 * rng.standard_normal((rate // 2, channels)), rate)
    whole, part, raw = clip(path), clip(path, 0.1, 0.25), clip(None, raw=path.read_bytes())
    store = open_store(tmp_path / "codes", codec_dir)
    clips = store.missing([record(whole, part), record(part, raw)])
    assert [c for c, _ in clips] == [whole, part, raw]
    assert list(store.encode(lambda: codec, clips)) == [None] * 3 and store.missing([record(*[c for c, _ in clips])]) == []
    expected = codec.encode(str(path))  # reads the file itself, with librosa
    assert torch.equal(store.codes(whole, "record 0"), expected) and torch.equal(store.codes(raw, "record 0"), expected)
    samples = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    expected = codec.encode(samples[round(0.1 * rate) : round(0.35 * rate)], rate)
    assert torch.equal(store.codes(part, "record 0"), expected)
    assert [store.num_frames(c, "record 0") for c in (whole, part)] == [13, expected.shape[1]]
    assert len(store.cache) == 2, "the same audio in a file and in a record is encoded once"


def test_files_are_known_by_their_content(codec, codec_dir, tmp_path):
    """A copied, moved or touched file is not encoded again; one with other content is."""
    path = tmp_path / "a.wav"
    write_wav(path, 0.2)
    store = open_store(tmp_path / "codes", codec_dir)
    assert list(store.encode(lambda: codec, store.missing([record(clip(path))]))) == [None]
    expected = store.codes(clip(path), "record 0")
    copy, moved = shutil.copy(path, tmp_path / "copy.wav"), path.rename(tmp_path / "moved.wav")
    os.utime(moved, (1, 1))
    clips = store.missing([record(clip(copy), clip(moved))])
    assert len(clips) == 2 and list(store.encode(no_codec, clips)) == [None, None]
    assert torch.equal(store.codes(clip(moved), "record 0"), expected)
    assert store.missing([record(clip(copy), clip(moved))]) == []
    write_wav(moved, 0.2, seed=1)
    with pytest.raises(DataError, match=r"record 0: .*moved\.wav has not been encoded, or has changed since"):
        store.codes(clip(moved), "record 0")
    assert len(store.missing([record(clip(moved))])) == 1


def test_unchanged_files_are_not_read_again(codec, codec_dir, tmp_path):
    """Shown by a file that was replaced behind the back of its size and time."""
    path = tmp_path / "a.wav"
    write_wav(path, 0.2)
    store = open_store(tmp_path / "codes", codec_dir)
    list(store.encode(lambda: codec, store.missing([record(clip(path))])))
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.missing([record(clip(path))]) == [] and store.num_frames(clip(path), "record 0") == 5


def test_a_codec_is_known_by_its_content(codec, codec_dir, tmp_path):
    """A copy is the same codec, other weights are another; what it was encoded with need not be there any more."""
    copy = tmp_path / "copy"
    shutil.copytree(codec_dir, copy)
    assert CodecInfo.of_folder(copy) == CodecInfo.of_folder(codec_dir)
    write_wav(tmp_path / "a.wav", 0.2)
    clips = [(clip(tmp_path / "a.wav"), "record 0")]
    assert list(open_store(tmp_path / "codes", copy).encode(lambda: codec, clips)) == [None]
    assert open_store(tmp_path / "codes", codec_dir).missing([record(clips[0][0])]) == []
    state = torch.load(copy / "model.pth")
    state["fc_prior.bias"] += 1
    torch.save(state, copy / "model.pth")
    assert CodecInfo.of_folder(copy).identity != CodecInfo.of_folder(codec_dir).identity
    assert open_store(tmp_path / "codes", copy).missing([record(clips[0][0])]) == clips
    shutil.rmtree(copy)
    assert open_store(tmp_path / "codes", copy).missing([record(clips[0][0])]) == []
    with pytest.raises(DataError, match="no folder .*neither a folder nor a repository"):
        open_store(tmp_path / "other codes", copy).missing([record(clips[0][0])])
    with pytest.raises(DataError, match="8 codebooks of 64 codes, the checkpoint 9 of 64"):
        AudioStore(9, 64, 25.0, tmp_path / "codes", str(codec_dir)).missing([record(clips[0][0])])


def test_frames_are_known_before_encoding(codec):
    """Against the real codec, around the lengths at which it makes another frame: 320 samples for this one's strides."""
    noise = np.random.default_rng(0).standard_normal(3 * 960).astype(np.float32)
    for num_samples in (960, 960 + 319, 960 + 320, 2 * 960 + 959):
        frames = codec.encode(noise[:num_samples], 24000).shape[1]
        assert expected_frames(num_samples / 24000, ratios=(8, 10, 12)) == frames


@pytest.mark.parametrize("rest, more", [(0, 0), (1, 0), (100, 0), (119, 1), (312, 1), (639, 1), (959, 1)])
def test_frames_of_the_published_codec(rest, more):
    """Golden: `demo.make_codec(full_size=True)`, the published configuration, which takes seconds per clip on a CPU."""
    for whole in (1, 2, 3, 7, 12):
        assert expected_frames((960 * whole + rest) / 24000) == whole + more


def test_frames_are_counted_without_reading_codes(tmp_path):
    codes = np.arange(8 * 50).reshape(8, 50)  # most of them out of range, which reading would notice
    np.save(tmp_path / "a.npy", codes)
    save_file({"codes": torch.from_numpy(codes)}, tmp_path / "a.safetensors")
    store = AudioStore(8, 64, 25.0, tmp_path / "codes")
    for path in (tmp_path / "a.npy", tmp_path / "a.safetensors"):
        parts = [clip(path), clip(path, 0.4), clip(path, 1.6, 10.0), clip(path, None, 0.2)]
        assert [store.num_frames(part, "record 0") for part in parts] == [50, 40, 10, 5]
        with pytest.raises(DataError, match=r"record 0: .*no frames left of 50 after offset"):
            store.num_frames(clip(path, 2.0), "record 0")
        with pytest.raises(DataError, match="holds codes 0 to 399"):
            store.codes(clip(path), "record 0")
    np.save(tmp_path / "flat.npy", np.zeros(8))
    with pytest.raises(DataError, match=r"flat.npy holds an array \[8\]; expected \[8 codebooks, frames\]"):
        store.num_frames(clip(tmp_path / "flat.npy"), "record 0")


def bad_files(folder: Path) -> dict[str, str]:
    """Audio that cannot be used, and what has to be said about it."""
    write_wav(folder / "whole.mp3", 1.0)
    write_wav(folder / "whole.flac", 1.0)
    for name in ("cut.mp3", "cut.flac"):
        content = (folder / f"whole{Path(name).suffix}").read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "text.wav").write_text("no audio")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan] * 4000), 24000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(0), 24000)
    write_wav(folder / "short.wav", 0.03)
    return {
        "cut.mp3": "is cut off",
        "cut.flac": "is not readable audio",
        "text.wav": "is not readable audio",
        "empty.wav": "is not readable audio",
        "nan.wav": "no finite numbers",
        "silent.wav": "no audio left",
        "short.wav": "0.030 s of audio is less than one frame (0.04 s)",
    }


def test_corrupt_audio_is_named_and_nothing_else_lost(codec_dir, tmp_path, capsys):
    expected = bad_files(tmp_path)
    names = ["whole.mp3", *expected, "whole.flac"]
    manifest = write_waves(tmp_path, names)
    assert run_encode(manifest, tmp_path / "codes", codec_dir) == 2
    said = capsys.readouterr().err
    assert f"{len(expected)} clips cannot be encoded" in said
    for name, problem in expected.items():
        line = next(line for line in said.splitlines() if name in line)
        assert f"record {names.index(name)} " in line and "messages[1].content" in line and problem in line
    assert len(dump(tmp_path / "codes", codec_dir)) == 2


def test_a_file_that_changes_while_it_is_read(codec, codec_dir, tmp_path, monkeypatch):
    from prepare import audio

    path = tmp_path / "a.wav"
    write_wav(path, 0.2)

    def read_and_change(part, source):
        samples = read_waveform(part, source)
        write_wav(path, 0.3)
        return samples

    monkeypatch.setattr(audio, "read_waveform", read_and_change)
    store = open_store(tmp_path / "codes", codec_dir)
    (problem,) = store.encode(lambda: codec, store.missing([record(clip(path))]))
    assert "was changed while it was read" in problem and len(store.cache) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The cache on disk


def write_random(folder: Path, numbers: range) -> dict[bytes, np.ndarray]:
    """Add clips whose key and codes are functions of their number."""
    folder.mkdir(exist_ok=True)
    clips = {}
    with CacheWriter(folder) as writer:
        for number in numbers:
            rng = np.random.default_rng(number)
            codes = rng.integers(0, 1024, (8, rng.integers(1, 30)))
            writer.add_clip(digest(number), codes)
            writer.add_file(digest("file", number), digest("content", number))
            clips[digest(number)] = codes
    return clips


def test_a_cache_merges_all_writers_and_ignores_what_kills_leave(tmp_path):
    expected = write_random(tmp_path, range(300)) | write_random(tmp_path, range(200, 500))
    key = bytes(15 * [7]) + b"\0"  # numpy leaves out zeros at the end
    expected[key] = np.ones((8, 3), int)
    with CacheWriter(tmp_path) as writer:
        writer.add_clip(key, expected[key])
    for path in tmp_path.iterdir():
        with open(path, "ab") as file:
            file.write(b"torn.")
    (tmp_path / "new.clips").write_bytes(b"")
    cache = CodesCache(tmp_path, 8)
    found = dict(cache.items())
    assert list(found) == sorted(expected) and len(cache) == 501 and key in cache
    assert all(np.array_equal(found[key], codes) for key, codes in expected.items())
    assert digest(499) in cache and digest(500) not in cache and cache.codes(digest(500)) is None
    assert cache.num_frames(digest(3)) == expected[digest(3)].shape[1]
    assert cache.content(digest("file", 7)) == digest("content", 7) and cache.content(digest("file", 500)) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_codes_are_noticed(damage, tmp_path):
    write_random(tmp_path, range(10))
    (path,) = tmp_path.glob("*.codes")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if damage == "remove" else path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(DataError, match=f"{path.name} is damaged; delete it and {path.stem}.clips, and encode again"):
        list(CodesCache(tmp_path, 8).items())


# ---------------------------------------------------------------------------------------------------------------------
# The command


def write_waves(folder: Path, names: list[str]) -> Path:
    said = {"role": "user", "content": "x"}
    return write_manifest(
        folder / "m.jsonl", [{"messages": [said, {"role": "assistant", "content": wave(name)}]} for name in names]
    )


def arguments(manifest: Path, out: Path, codec_dir: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    return parser.parse_args([str(manifest), "--out", str(out), "--audio_tokenizer", str(codec_dir), "--num_workers", "2"])


def run_encode(manifest: Path, out: Path, codec_dir: Path) -> int:
    return says_errors(lambda _: encode.run(arguments(manifest, out, codec_dir)))([])


def encode_in_child(manifest: Path, out: Path, codec_dir: Path) -> None:
    codes_cache.COMMIT_SEC = 0.05
    torch.set_num_threads(1)
    raise SystemExit(run_encode(manifest, out, codec_dir))


def start_encode(manifest: Path, out: Path, codec_dir: Path):
    process = _context.Process(target=encode_in_child, args=(manifest, out, codec_dir))
    process.start()
    return process


def write_clips(folder: Path, count: int) -> Path:
    for number in range(count):
        write_wav(folder / f"{number}.wav", 0.1 + 0.01 * (number % 10), seed=number)
    return write_waves(folder, [f"{number}.wav" for number in range(count)])


def num_rows(cache_dir: Path) -> int:
    """Clips in all shards, whether or not others hold them too."""
    return sum(path.stat().st_size // codes_cache.CLIP.itemsize for path in cache_dir.glob("*/*.clips"))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_encode_goes_on(kills, codec_dir, tmp_path, capsys):
    """SIGKILL at random moments, a few clips after the last one; in the end the cache equals that of an undisturbed run."""
    manifest = write_clips(tmp_path, 10 * kills)
    assert run_encode(manifest, tmp_path / "expected", codec_dir) == 0
    expected, out, rng = dump(tmp_path / "expected", codec_dir), tmp_path / "codes", random.Random(kills)
    held = [0]
    for _ in range(kills):
        process = start_encode(manifest, out, codec_dir)
        enough = held[-1] + rng.randrange(3)
        while process.exitcode is None and num_rows(out) <= enough:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it was killed: use more clips"
        held.append(len(dump(out, codec_dir)))
        assert held[-2] < held[-1] < len(expected)
    capsys.readouterr()
    assert run_encode(manifest, out, codec_dir) == 0
    assert f"{len(expected) - held[-1]} clips of" in capsys.readouterr().err, "what was there was encoded again"
    assert dump(out, codec_dir) == expected
    assert run_encode(manifest, out, codec_dir) == 0
    assert "nothing to encode" in capsys.readouterr().err and dump(out, codec_dir) == expected


def test_two_processes_on_one_cache(codec_dir, tmp_path):
    """Two commands that know nothing of each other, and two ranks that do: nothing is lost, and ranks do nothing twice."""
    manifest, ranks, both = write_clips(tmp_path, 8), tmp_path / "ranks", tmp_path / "both"
    processes = [start_encode(manifest, both, codec_dir) for _ in range(2)]
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    assert run_ranks(encode_as_rank, 2, manifest, ranks, codec_dir) == [[], []]
    assert len(dump(ranks, codec_dir)) == 8 and dump(ranks, codec_dir) == dump(both, codec_dir)
    assert num_rows(ranks) == 8 and len(list(ranks.glob("*/*.clips"))) == 2


def encode_as_rank(dist, manifest: Path, out: Path, codec_dir: Path) -> list[str]:
    return encode.encode(arguments(manifest, out, codec_dir), dist)


def test_ranks_share_the_audio_by_its_duration():
    rng = np.random.default_rng(0)
    seconds = rng.exponential(5, 1000)
    for world_size in (1, 2, 7):
        ranks = encode.split(seconds, world_size)
        shares = [seconds[ranks == rank].sum() for rank in range(world_size)]
        assert (np.diff(ranks) >= 0).all() and max(shares) - min(shares) < 2 * seconds.max()
    assert encode.split(np.zeros(3), 2).max() < 2
