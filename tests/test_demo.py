"""The demo: toy voices can be heard, and its figures and sounds are those of what was generated."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch

from data import ChatMLDataset
from generate.files import read_results, write_results
from generate.lines import Chunking, line_of_request
from generate.official import as_prompt
from prepare.audio import AudioStore
from prepare.manifest import read_manifest
from prepare.prompts import QUIET_ROOM
from tools import demo
from tools import toys as toybox
from tools.vocoder import ToyVocoder


def voice(pitch: int, *colour: int) -> toybox.Speaker:
    return toybox.Speaker("x", (pitch, *(colour or (0, 5, 5, 0, 10))))


def sound(text: str, speaker: toybox.Speaker) -> np.ndarray:
    """[samples]"""
    return ToyVocoder().decode(torch.from_numpy(toybox.speech(text, speaker).astype(np.int64))[None])[0, 0]


def pitch_hz(wave: np.ndarray) -> float:
    """By the first of the highest peaks of the autocorrelation, between 70 and 300 Hz."""
    wave = wave - wave.mean()
    spectrum = np.fft.rfft(wave, 2 * len(wave))
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: ToyVocoder.sampling_rate // 70]
    lags = np.arange(ToyVocoder.sampling_rate // 300, len(correlation) - 1)
    peaks = lags[(correlation[lags] >= correlation[lags - 1]) & (correlation[lags] >= correlation[lags + 1])]
    return ToyVocoder.sampling_rate / peaks[correlation[peaks] > 0.9 * correlation[peaks].max()][0]


def shape(wave: np.ndarray) -> np.ndarray:
    """The spectrum in bands of 250 Hz, of length 1."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    bands = np.add.reduceat(power, np.arange(0, len(power), max(1, len(power) // 32)))
    return bands / np.linalg.norm(bands)


def test_timbre_is_pitch_and_letters_are_formants():
    """The pitch of a voice is the same in every letter, within 3 %; letters differ in their spectrum, in one voice and across
    voices alike."""
    for code in (0, 7, 14, 19):
        expected = 85 * 2 ** (1.6 * code / toybox.NUM_TIMBRES)
        for text in ("a", "i", "oo", "mu"):
            assert pitch_hz(sound(text, voice(code))) == pytest.approx(expected, rel=0.03)
    a, other_a, i = shape(sound("a", voice(2))), shape(sound("a", voice(4))), shape(sound("i", voice(2)))
    assert a @ other_a > a @ i


def test_sounds_are_a_function_of_the_codes():
    once, again = (sound("abc de", voice(3)) for _ in range(2))
    assert np.array_equal(once, again) and once.dtype == np.float32 and np.abs(once).max() <= 0.71
    codes = toybox.speech("abc de", voice(3))
    assert len(once) == codes.shape[1] * ToyVocoder.frame_samples
    for k in range(8):  # a wrong code is heard, in each codebook and where it is
        wrong = codes.copy()
        wrong[k, -2] = (wrong[k, -2] + 7) % 64
        heard = ToyVocoder().decode(torch.from_numpy(wrong.astype(np.int64))[None])[0, 0]
        difference = np.abs(heard / np.abs(heard).max() - once / np.abs(once).max())
        assert difference[-3 * ToyVocoder.frame_samples :].max() > 0.01, k
    pause = slice(codes[0].tolist().index(26) * ToyVocoder.frame_samples, None)
    assert np.abs(once[pause][800:960]).max() < 0.1 * np.abs(once).max()


def test_any_codes_make_a_sound():
    """An untrained model emits codes that no toy voice has, or none."""
    generator = torch.Generator().manual_seed(0)
    wave = ToyVocoder().decode(torch.randint(0, 64, (1, 8, 12), generator=generator))
    assert np.isfinite(wave).all() and np.abs(wave).max() > 0.1
    assert ToyVocoder().decode(torch.zeros((1, 8, 0), dtype=torch.long)).shape == (1, 1, 0)


# ---- the demo's files


def asked(record: dict) -> dict:
    """The request whose answer a test record's last clip is, as a line of `generate --lines`."""
    *before, user, _ = record["messages"]
    system = before[0]["content"] if before and before[0]["role"] == "system" else ""
    clips = [part for part in system if part["type"] == "audio"] if isinstance(system, list) else []
    transcripts = [turn["content"].split("] ")[-1] for turn in before if turn["role"] == "user"]
    clips += [turn["content"] for turn in before if turn["role"] == "assistant"]
    scene = QUIET_ROOM if QUIET_ROOM in system else None
    request = {"text": user["content"], "ref_audio": [clip["audio_url"] for clip in clips], "scene": scene}
    return request | ({"ref_text": transcripts} if transcripts else {})


def test_the_demo_trains_on_the_tokens_that_inference_sends(toys, config, tokenizer):
    store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, 25.0, toys / "codes")
    lines = [json.loads(line) for line in (toys / "test.jsonl").read_text().splitlines()]
    trained = ChatMLDataset(read_manifest(toys / "test.jsonl"), tokenizer, store)
    assert {line["misc"]["kind"] for line in lines} == {kind.name for kind in toybox.KINDS}
    for record, sample in zip(lines, trained):
        request = line_of_request(asked(record), "0", toys, "line 0", Chunking())
        assert len(request.chunks) == 1
        prompt = as_prompt(ChatMLDataset([request.record([], request.chunks[0])], tokenizer, store)[0], tokenizer)
        count, num_frames = len(prompt.input_ids), prompt.audio_ids_concat.shape[1]
        assert torch.equal(sample.input_ids[:count], prompt.input_ids)
        assert torch.equal(sample.audio_ids_concat[:, :num_frames], prompt.audio_ids_concat)
        assert tokenizer.decode(sample.input_ids[count:]) == "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"


def test_turns_of_a_dialogue_are_those_of_its_speakers(toys):
    """Every letter in its speaker's timbre, a frame of silence before another one begins, where the record tells it."""
    found = 0
    for record in map(json.loads, (toys / "test.jsonl").read_text().splitlines()):
        turns = [turn.split("] ") for turn in record["messages"][-2]["content"].split("\n")]
        if len(turns) < 2:
            continue
        codes = np.load(toys / record["messages"][-1]["content"]["audio_url"])
        changes = [round(sec * 25) for sec in record["misc"]["speaker_changes_sec"]]
        references = [np.load(toys / turn["content"]["audio_url"]) for turn in record["messages"][1:-2:2]]
        assert len(turns) == len(references) == len(changes) + 1
        for (_, text), start, end, reference in zip(turns, [0, *changes], [*changes, codes.shape[1] + 1], references):
            assert np.array_equal(codes[:, start : end - 1], toybox.speech(text[:-1], toybox.Speaker("", (*reference[2:, 0],))))
            assert codes.shape[1] == end - 1 or tuple(codes[:, end - 1]) == toybox.SILENCE
        letters = "".join(text[:-1] for _, text in turns)
        assert len(set(letters)) == len(letters)
        found += 1
    assert found == 20


def generated_clips(manifest, folder, wrong: bool) -> None:
    """What `evaluate` writes for a model that is always right, or nearly always silent."""
    folder.mkdir()
    results = []
    for index, record in enumerate(read_manifest(manifest)):
        codes = np.load(record.audio[-1].path)
        codes = codes[:, :0] if wrong and index else codes
        np.save(folder / f"{index:05d}.npy", codes)
        result = {"name": f"{index:05d}", "kind": record.chatml.misc["kind"], "text": "t", "source": record.source}
        results.append(result | {"codes": f"{index:05d}.npy", "frames": codes.shape[1], "stopped": True})
    write_results(folder, results)


def test_the_first_test_record_of_each_kind_is_heard(toys, tmp_path):
    """Its sample, target and reference, each as the vocoder plays its codes; nothing for a sample without frames."""
    test = toys / "test.jsonl"
    records = list(read_manifest(test))
    first = {record.chatml.misc["kind"]: index for index, record in reversed(list(enumerate(records)))}
    for wrong in (False, True):
        generated_clips(test, tmp_path / f"generated {wrong}", wrong)
        demo.write_sounds(test, tmp_path / f"generated {wrong}", tmp_path / f"samples {wrong}")
        results = read_results(tmp_path / f"samples {wrong}")
        assert [result["name"] for result in results] == [f"{index:05d}" for index in sorted(first.values())]
        for result in results:
            clips = [np.load(part.path) for part in records[int(result["name"])].audio]
            sounds = {key: tmp_path / f"samples {wrong}" / result[key] for key in result if key.endswith("wav")}
            references = {"reference_wav"} if len(clips) > 1 else set()
            assert sounds.keys() == references | {"target_wav"} | ({"wav"} if result["frames"] else set())
            wave, rate = soundfile.read(sounds["target_wav"], dtype="float32")
            expected = ToyVocoder().decode(torch.from_numpy(clips[-1].astype(np.int64))[None])[0, 0]
            assert rate == ToyVocoder.sampling_rate and wave == pytest.approx(expected, abs=1e-4)
            assert soundfile.info(sounds.get("reference_wav", sounds["target_wav"])).frames > 0


def test_samples_of_training_get_sounds(tmp_path):
    """Those in step_N, and the targets that they name elsewhere; a sample without frames has none."""
    for name, frames in (("step_5/0", 4), ("step_5/1", 0), ("prompts/0.target", 6)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", np.zeros((8, frames), np.int16))
    target = {"target_codes": "../prompts/0.target.npy"}
    write_results(tmp_path / "step_5", [{"codes": "0.npy"} | target, {"codes": "1.npy"} | target])
    demo.add_sounds(tmp_path / "step_5")
    spoken, silent = read_results(tmp_path / "step_5")
    assert (spoken["wav"], spoken["target_wav"]) == ("0.wav", "../prompts/0.target.wav")
    assert "wav" not in silent and silent["target_wav"] == "../prompts/0.target.wav"
    for name, frames in (("step_5/0.wav", 4), ("prompts/0.target.wav", 6)):
        assert soundfile.info(tmp_path / name).frames == frames * ToyVocoder.frame_samples


def test_the_whole_demo(tmp_path, capfd):
    """Two steps and one record of each kind: demo.json has the figures that are printed, the report plays both models."""
    out = tmp_path / "demo"
    kinds = tuple(kind._replace(num_tests=1) for kind in toybox.KINDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toybox, "NUM_TRAIN_SPEAKERS", 40)
        patch.setattr(toybox, "KINDS", kinds)
        patch.setattr(toybox.make_demo, "__defaults__", (0, 40))
        argv = ["--output_dir", str(out), "--steps", "2", "--nproc", "1", "--num_workers", "0", "--num_samples", "1"]
        assert demo.main(argv) == 0
    printed = capfd.readouterr().out
    found = json.loads((out / "demo.json").read_text())
    assert found.keys() == {"untrained", "trained"}
    for scores in found.values():
        assert scores.keys() == {kind.name for kind in kinds}
        for kind, score in scores.items():
            assert score.keys() == {"code_match", "exact", "stops", "clips"} and score["clips"] == 1
            assert f"{kind:36} codes {score['code_match']:6.1%}   exact clips {score['exact']:2d}/1" in printed
    page = (out / "run" / "report.html").read_text()
    assert page.count("data:audio/wav") >= 2 * len(kinds) and "untrained" in page
    assert demo.main(argv[:-8] + ["--output_dir", str(tmp_path)]) == 2, "a folder of something else"
    assert "holds files that no demo wrote" in capfd.readouterr().err
