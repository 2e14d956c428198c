"""Small faithful copies of public layouts: each becomes the clips, texts and speakers that it means, and trains.

docs/datasets.md lists the same layouts. What is refused is in REFUSED.
"""

from __future__ import annotations

import importlib
import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ONLY_STEPS

import train
from common import DataError
from config import to_argv
from prepare import packed, prompts
from prepare.__main__ import main as prepare
from prepare.audio import duration_sec, expected_frames
from prepare.forms import open_manifest
from prepare.manifest import check, read_manifest
from prepare.rows import COLUMNS, Reading

BARE = Reading(normalize=False, phrasing=None)
ONE, TWO, THREE = "The first sentence.", "And here is another one!", "A third, of someone else?"
ZH_ONE, ZH_TWO = "广州女大学生登山失联四天。", "尊重科学规律的要求！"


@dataclass
class Layout:
    """A dataset: its clips, its other files, and (clip, text, speaker) of each record. start: what is opened, if not all"""

    clips: str
    files: dict[str, str]
    expected: list[tuple]
    start: str = ""
    reading: Reading = field(default_factory=lambda: BARE)


LAYOUTS = {
    "LJSpeech": Layout(
        "wavs/LJ001-0001.wav wavs/LJ001-0002.wav",
        {
            "metadata.csv": f"LJ001-0001|Dr. X was here in 1847.|Doctor X was here in eighteen forty-seven.\nLJ001-0002|{TWO}|{TWO}\n"
        },
        [
            ("wavs/LJ001-0001.wav", "Doctor X was here in eighteen forty-seven.", None),
            ("wavs/LJ001-0002.wav", TWO, None),
        ],
    ),
    "LJSpeech with a header": Layout(
        "wavs/a.wav wavs/b.wav",
        {"metadata.csv": f"id|text|normalized_text\na|1. x|{ONE}\nb|{TWO}|{TWO}\n"},
        [("wavs/a.wav", ONE, None), ("wavs/b.wav", TWO, None)],
    ),
    "LJSpeech with flac": Layout(
        "wavs/a.flac wavs/b.flac",
        {"metadata.csv": f"a|{ONE}|{ONE}\nb|{TWO}|{TWO}\n"},
        [("wavs/a.flac", ONE, None), ("wavs/b.flac", TWO, None)],
    ),
    "LJSpeech with phonemes": Layout(
        "wavs/a.wav wavs/b.wav",
        {"metadata.csv": f"a|{ONE}|ðə fˈɜːst sˈɛntəns\nb|{TWO}|ænd hˈɪə ɪz ənˈʌðə wˌʌn\n"},
        [("wavs/a.wav", ONE, None), ("wavs/b.wav", TWO, None)],
    ),
    "VITS": Layout(
        "wavs/a.wav wavs/b.wav",
        {"filelists/train.txt": f"wavs/a.wav|0|{ONE}\nwavs/b.wav|1|{TWO}\n"},
        [("wavs/a.wav", ONE, "0"), ("wavs/b.wav", TWO, "1")],
    ),
    "GPT-SoVITS": Layout(
        "vocal/a.wav vocal/b.wav",
        {"train.list": f"vocal/a.wav|派蒙|ZH|{ZH_ONE}\nvocal/b.wav|派蒙|EN|{TWO}\n"},
        [("vocal/a.wav", ZH_ONE, "派蒙"), ("vocal/b.wav", TWO, "派蒙")],
        "train.list",
    ),
    "Bert-VITS2": Layout(
        "wavs/a.wav wavs/b.wav",
        {
            "esd.list": f"wavs/a.wav|anna|ZH|{ZH_ONE}|_ g uang zh ou _|0 3 3 1 1 0|1 2 2 1\n"
            f"wavs/b.wav|ben|EN|{TWO}|_ ae n d _|0 0 0 0 0|1 3 1\n"
        },
        [("wavs/a.wav", ZH_ONE, "anna"), ("wavs/b.wav", TWO, "ben")],
        "esd.list",
    ),
    "Piper": Layout(
        "wav/a.wav wav/b.wav",
        {"metadata.csv": f"a|{ONE}\nb|{TWO}\n"},
        [("wav/a.wav", ONE, None), ("wav/b.wav", TWO, None)],
    ),
    "Piper, several speakers": Layout(
        "wav/a.wav wav/b.wav",
        {"metadata.csv": f"a|anna|{ONE}\nb|ben|{TWO}\n"},
        [("wav/a.wav", ONE, "anna"), ("wav/b.wav", TWO, "ben")],
    ),
    "XTTS (Coqui)": Layout(
        "wavs/a.wav wavs/b.wav",
        {"metadata_train.csv": f'audio_file|text|speaker_name\nwavs/a.wav|{ONE}|anna\nwavs/b.wav|"{TWO} ""so"""|ben\n'},
        [("wavs/a.wav", ONE, "anna"), ("wavs/b.wav", f'{TWO} "so"', "ben")],
    ),
    "StyleTTS2 with written texts": Layout(
        "wavs/a.wav wavs/b.wav",
        {"train_list.txt": f"wavs/a.wav|{ONE}|0\nwavs/b.wav|{TWO}|1\n"},
        [("wavs/a.wav", ONE, "0"), ("wavs/b.wav", TWO, "1")],
    ),
    "LibriSpeech": Layout(
        "dev-clean/84/121123/84-121123-0000.flac dev-clean/174/50561/174-50561-0001.flac",
        {
            "SPEAKERS.TXT": "84 | F | dev-clean | 8 | Christie\n",
            "dev-clean/84/121123/84-121123.trans.txt": "84-121123-0000 GO DO YOU HEAR\n",
            "dev-clean/174/50561/174-50561.trans.txt": "174-50561-0001 FORGOTTEN TOO THE NAME\n",
        },
        [
            ("dev-clean/174/50561/174-50561-0001.flac", "FORGOTTEN TOO THE NAME", "174"),
            ("dev-clean/84/121123/84-121123-0000.flac", "GO DO YOU HEAR", "84"),
        ],
    ),
    "LibriTTS": Layout(
        "train-clean-100/19/198/19_198_000000_000000.wav train-clean-100/26/495/26_495_000004_000000.wav",
        {
            "train-clean-100/19/198/19_198_000000_000000.normalized.txt": ONE,
            "train-clean-100/19/198/19_198_000000_000000.original.txt": "1st",
            "train-clean-100/19/198/19_198.trans.tsv": f"19_198_000000_000000\t1st\t{ONE}\n",
            "train-clean-100/26/495/26_495_000004_000000.normalized.txt": TWO,
            "train-clean-100/26/495/26_495_000004_000000.original.txt": "2nd",
        },
        [
            ("train-clean-100/19/198/19_198_000000_000000.wav", ONE, "19"),
            ("train-clean-100/26/495/26_495_000004_000000.wav", TWO, "26"),
        ],
    ),
    "VCTK": Layout(
        "wav48_silence_trimmed/p225/p225_001_mic1.flac wav48_silence_trimmed/p225/p225_001_mic2.flac "
        "wav48_silence_trimmed/p226/p226_002_mic1.flac wav48_silence_trimmed/p226/p226_002_mic2.flac",
        {"txt/p225/p225_001.txt": ONE, "txt/p226/p226_002.txt": TWO, "speaker-info.txt": "ID AGE\np225 23 F\n"},
        [
            ("wav48_silence_trimmed/p225/p225_001_mic1.flac", ONE, "p225"),
            ("wav48_silence_trimmed/p226/p226_002_mic1.flac", TWO, "p226"),
        ],
    ),
    "AISHELL-3": Layout(
        "train/wav/SSB0005/SSB00050001.wav train/wav/SSB0009/SSB00090002.wav",
        {
            "train/content.txt": "SSB00050001.wav\t广 guang3 州 zhou1 女 nv3 大 da4\nSSB00090002.wav\t尊 zun1 重 zhong4 科 ke1 学 xue2\n",
            "train/label_train-set.txt": "SSB00050001|guang3 zhou1|广州%女大$\n",
            "spk-info.txt": "SSB0005 B female north\n",
        },
        [
            ("train/wav/SSB0005/SSB00050001.wav", "广州女大", "SSB0005"),
            ("train/wav/SSB0009/SSB00090002.wav", "尊重科学", "SSB0009"),
        ],
    ),
    "MLS": Layout(
        "train/audio/10148/10119/10148_10119_000000.flac train/audio/252/11/252_11_000001.flac",
        {
            "train/transcripts.txt": f"10148_10119_000000\t{ONE}\n252_11_000001\t{TWO}\n",
            "train/segments.txt": "10148_10119_000000\thttp://x/y.mp3\t1.0\t2.0\n252_11_000001\thttp://x/z.mp3\t1.0\t2.0\n",
            "train/handles.txt": "10148_10119_000000\n252_11_000001\n",
        },
        [
            ("train/audio/10148/10119/10148_10119_000000.flac", ONE, "10148"),
            ("train/audio/252/11/252_11_000001.flac", TWO, "252"),
        ],
    ),
    "ESD": Layout(
        "0011/Angry/0011_000351.wav 0012/Happy/0012_000701.wav 0011/Happy/0011_000701.wav",
        {
            "0011/0011.txt": f"0011_000351\t{ONE}\tAngry\n0011_000701\t{TWO}\tHappy\n",
            "0012/0012.txt": f"0012_000701\t{TWO}\tHappy\n",
        },
        [
            ("0011/Angry/0011_000351.wav", ONE, "0011"),
            ("0011/Happy/0011_000701.wav", TWO, "0011"),
            ("0012/Happy/0012_000701.wav", TWO, "0012"),
        ],
    ),
    "Common Voice": Layout(
        "clips/common_voice_de_1.mp3 clips/common_voice_de_2.mp3",
        {
            "train.tsv": f"client_id\tpath\tsentence\tup_votes\n1f\tcommon_voice_de_1.mp3\t{ONE}\t2\n",
            "validated.tsv": "client_id\tpath\tsentence\tup_votes\n"
            f'1f\tcommon_voice_de_1.mp3\t{ONE}\t2\n2e\tcommon_voice_de_2.mp3\t"{TWO}"\t2\n',
            "times.txt": "common_voice_de_1.mp3\t3\n",
        },
        [("clips/common_voice_de_1.mp3", ONE, "1f"), ("clips/common_voice_de_2.mp3", f'"{TWO}"', "2e")],
    ),
    "CSS10": Layout(
        "meisterfloh/a.wav meisterfloh/b.wav",
        {"transcript.txt": f"meisterfloh/a.wav|Im Jahr 1.|{ONE}|6.28\nmeisterfloh/b.wav|{TWO}|{TWO}|2.1\n"},
        [("meisterfloh/a.wav", ONE, "meisterfloh"), ("meisterfloh/b.wav", TWO, "meisterfloh")],
    ),
    "JSUT": Layout(
        "basic5000/wav/BASIC5000_0001.wav travel1000/wav/TRAVEL1000_0001.wav",
        {
            "basic5000/transcript_utf8.txt": "BASIC5000_0001:水をマレーシアから買わなくてはならないのです。\n",
            "travel1000/transcript_utf8.txt": "TRAVEL1000_0001:私は彼の日記を盗み読みした。\n",
        },
        [
            ("basic5000/wav/BASIC5000_0001.wav", "水をマレーシアから買わなくてはならないのです。", "jsut"),
            ("travel1000/wav/TRAVEL1000_0001.wav", "私は彼の日記を盗み読みした。", "jsut"),
        ],
        reading=Reading(normalize=False, phrasing=None, speaker="jsut"),
    ),
    "texts beside clips (.txt)": Layout(
        "anna/a.wav ben/b.wav",
        {"anna/a.txt": ONE, "ben/b.txt": TWO},
        [("anna/a.wav", ONE, "anna"), ("ben/b.wav", TWO, "ben")],
    ),
    "texts beside clips (.lab)": Layout(
        "anna/a.wav ben/b.wav",
        {"anna/a.lab": ONE, "ben/b.lab": TWO},
        [("anna/a.wav", ONE, "anna"), ("ben/b.wav", TWO, "ben")],
    ),
    "texts beside clips (.json)": Layout(
        "a.mp3 b.mp3",
        {
            "a.json": json.dumps({"id": "a", "wav": "a.mp3", "text": ONE, "speaker": "EN_1", "dnsmos": 3.3}),
            "b.json": json.dumps({"id": "b", "wav": "b.mp3", "text": TWO, "speaker": "EN_2", "dnsmos": 3.3}),
        },
        [("a.mp3", ONE, "EN_1"), ("b.mp3", TWO, "EN_2")],
    ),
    "parallel wav and txt folders": Layout(
        "wavs/anna/001.wav wavs/ben/001.wav",
        {"txt/anna/001.txt": ONE, "txt/ben/001.txt": TWO},
        [("wavs/anna/001.wav", ONE, "anna"), ("wavs/ben/001.wav", TWO, "ben")],
    ),
    "splits as folders": Layout(
        "train/anna/a.wav test/ben/b.wav",
        {"train/anna/a.txt": ONE, "test/ben/b.txt": TWO},
        [("test/ben/b.wav", TWO, "ben"), ("train/anna/a.wav", ONE, "anna")],
    ),
    "a copy from a Mac": Layout(
        "anna/a.wav anna/._a.wav __MACOSX/anna/._a.wav",
        {"anna/a.txt": ONE, "anna/._a.txt": "\0\5\6", ".DS_Store": "x"},
        [("anna/a.wav", ONE, "anna")],
    ),
    "audio folder": Layout(
        "a.wav b.wav",
        {"metadata.csv": f'file_name,transcription\na.wav,{ONE}\nb.wav,"{THREE}"\n'},
        [("a.wav", ONE, None), ("b.wav", THREE, None)],
    ),
    "audio folder with splits": Layout(
        "train/a.wav test/b.wav",
        {
            "train/metadata.csv": f"file_name,transcription\na.wav,{ONE}\n",
            "test/metadata.csv": f"file_name,transcription\nb.wav,{TWO}\n",
        },
        [("test/b.wav", TWO, None), ("train/a.wav", ONE, None)],
    ),
    "subtitles (.srt)": Layout(
        "talk.wav",
        {
            "talk.srt": f"1\n00:00:00,000 --> 00:00:00,150\n[SPEAKER_00]: {ONE}\n\n2\n00:00:00,200 --> 00:00:00,400\n<i>And here is\nanother one!</i>\n"
        },
        [("talk.wav", ONE, "SPEAKER_00", 0.0, 0.15), ("talk.wav", TWO, None, 0.2, 0.2)],
    ),
    "subtitles (.vtt), given by the file": Layout(
        "talk.wav",
        {
            "talk.vtt": f"WEBVTT\n\n00:00.000 --> 00:00.150 align:start\n<v Anna>{ONE}\n\n00:00.200 --> 00:00.400\n<v Ben>{TWO}</v>\n"
        },
        [("talk.wav", ONE, "Anna", 0.0, 0.15), ("talk.wav", TWO, "Ben", 0.2, 0.2)],
        "talk.vtt",
    ),
    "Whisper and WhisperX": Layout(
        "anna/talk.mp3 ben/talk.mp3",
        {
            "anna/talk.json": json.dumps({"text": "x", "segments": [{"id": 0, "start": 0.0, "end": 0.15, "text": f" {ONE}"}]}),
            "ben/talk.json": json.dumps(
                {"segments": [{"start": 0.2, "end": 0.4, "text": TWO, "speaker": "SPEAKER_01", "words": []}]}
            ),
        },
        [("anna/talk.mp3", ONE, "anna", 0.0, 0.15), ("ben/talk.mp3", TWO, "SPEAKER_01", 0.2, 0.2)],
    ),
    "TextGrid": Layout(
        "talk.wav",
        {
            "talk.TextGrid": 'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 0.4\ntiers? <exists>\nsize = 2\nitem []:\n'
            '    item [1]:\n        class = "IntervalTier"\n        name = "utt"\n        xmin = 0\n        xmax = 0.4\n'
            '        intervals: size = 3\n        intervals [1]:\n            xmin = 0\n            xmax = 0.15\n            text = "'
            + ONE
            + '"\n        intervals [2]:\n            xmin = 0.15\n            xmax = 0.2\n            text = ""\n'
            '        intervals [3]:\n            xmin = 0.2\n            xmax = 0.4\n            text = "'
            + TWO
            + '"\n    item [2]:\n        class = "IntervalTier"\n        name = "phones"\n        xmin = 0\n        xmax = 0.4\n'
            '        intervals: size = 1\n        intervals [1]:\n            xmin = 0\n            xmax = 0.4\n            text = "AH0"\n'
        },
        [("talk.wav", ONE, None, 0.0, 0.15), ("talk.wav", TWO, None, 0.2, 0.2)],
    ),
    "labels of Audacity": Layout(
        "talk.wav",
        {"talk.txt": f"0.000000\t0.150000\t{ONE}\n\\\t100.0\t200.0\n0.200000\t0.400000\t{TWO}\n"},
        [("talk.wav", ONE, None, 0.0, 0.15), ("talk.wav", TWO, None, 0.2, 0.2)],
    ),
    "a table of hours, minutes and seconds": Layout(
        "talk.wav",
        {"t.csv": f"audio,text,start,end\ntalk.wav,{ONE},00:00:00.00,00:00:00.15\ntalk.wav,{TWO},0:00:00.20,0:00:00.40\n"},
        [("talk.wav", ONE, None, 0.0, 0.15), ("talk.wav", TWO, None, 0.2, 0.2)],
        "t.csv",
    ),
    "Lhotse cuts": Layout(
        "talk.wav",
        {
            "cuts.jsonl": "".join(
                json.dumps(
                    {
                        "id": name,
                        "start": start,
                        "duration": 0.15,
                        "channel": 0,
                        "supervisions": [
                            {
                                "id": name,
                                "recording_id": "talk",
                                "start": 0.0,
                                "duration": 0.15,
                                "text": text,
                                "speaker": "anna",
                            }
                        ],
                        "recording": {
                            "id": "talk",
                            "sources": [{"type": "file", "channels": [0], "source": "talk.wav"}],
                            "duration": 0.4,
                        },
                        "type": "MonoCut",
                    }
                )
                + "\n"
                for name, start, text in (("a", 0.0, ONE), ("b", 0.2, TWO))
            )
        },
        [("talk.wav", ONE, "anna", 0.0, 0.15), ("talk.wav", TWO, "anna", 0.2, 0.15)],
        "cuts.jsonl",
    ),
    "NeMo": Layout(
        "a.wav b.wav",
        {
            "m.json": f'{{"audio_filepath": "a.wav", "duration": 0.4, "text": "1. x", "text_normalized": "{ONE}"}}\n'
            f'{{"audio_filepath": "b.wav", "duration": 0.4, "text": "2. x", "text_normalized": "{TWO}"}}\n'
        },
        [("a.wav", ONE, None), ("b.wav", TWO, None)],
        "m.json",
    ),
    "WeNet": Layout(
        "a.wav b.wav",
        {"data.list": f'{{"key": "a", "wav": "a.wav", "txt": "{ONE}"}}\n{{"key": "b", "wav": "b.wav", "txt": "{TWO}"}}\n'},
        [("a.wav", ONE, None), ("b.wav", TWO, None)],
        "data.list",
    ),
    "FunASR": Layout(
        "a.wav b.wav",
        {
            "train.jsonl": f'{{"key": "a", "source": "a.wav", "target": "{ONE}"}}\n{{"key": "b", "source": "b.wav", "target": "{TWO}"}}\n'
        },
        [("a.wav", ONE, None), ("b.wav", TWO, None)],
        "train.jsonl",
    ),
    "FLEURS": Layout(
        "audio/train/1.wav audio/dev/2.wav",
        {
            "train.tsv": "903\t1.wav\tThe first Sentence.\tthe first sentence\tt h e | f i r s t | s e n t e n c e |\t6400\tMALE\n",
            "dev.tsv": "904\t2.wav\tAnd here, another One!\tand here another one\ta n d | h e r e | a n o t h e r | o n e |\t6400\tFEMALE\n",
        },
        [("audio/train/1.wav", "The first Sentence.", None), ("audio/dev/2.wav", "And here, another One!", None)],
    ),
    "Kaldi with commands that name a file": Layout(
        "a.flac b.wav",
        {"wav.scp": "a flac -c -d -s a.flac |\nb sox b.wav -t wav - |\n", "text": f"a {ONE}\nb {TWO}\n"},
        [("a.flac", ONE, None), ("b.wav", TWO, None)],
    ),
    "a folder made by pair": Layout(
        "a.wav",
        {
            "leakage.json": "{}",
            "train.jsonl": json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": ONE},
                        {"role": "assistant", "content": {"type": "audio", "audio_url": "a.wav"}},
                    ]
                }
            ),
        },
        [("a.wav", ONE, None)],
    ),
    "Kaldi": Layout(
        "rec.wav a.wav",
        {"wav.scp": "a a.wav\nb rec.wav\n", "text": f"a {ONE}\nb {TWO}\n", "utt2spk": "a anna\nb ben\n"},
        [("a.wav", ONE, "anna"), ("rec.wav", TWO, "ben")],
    ),
}


def make(layout: Layout, folder: Path) -> Path:
    """Write the files; returns what is to be opened. All clips are one sound, 0.4 s long."""
    for name in layout.clips.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * np.sin(np.arange(6400) / 9), 16000, format="FLAC" if name.endswith("flac") else "WAV")
    for name, content in layout.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder / layout.start


def records_of(path: Path | str, folder: Path, reading: Reading) -> list[tuple]:
    """(clip, text, speaker, and offset and duration if there are any) of each record."""
    found = []
    for record in check(open_manifest(path, reading=reading)[0])[0]:
        part, user = record.audio[-1], record.chatml.messages[-2].content
        span = tuple(round(sec, 3) for sec in (part.offset_sec, part.duration_sec) if sec is not None)
        found.append((part.path.relative_to(folder).as_posix(), user, record.chatml.speaker, *span))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_means_these_clips_texts_and_speakers(name, tmp_path):
    layout = LAYOUTS[name]
    assert sorted(records_of(make(layout, tmp_path), tmp_path, layout.reading)) == sorted(layout.expected)


def test_every_layout_trains(codec_dir, toys, tmp_path, capsys):
    """Two steps of train.py on all of them at once, as a user would take them: read, encoded by a codec, trained."""
    folders = {name: tmp_path / f"{number}" for number, name in enumerate(LAYOUTS)}
    direct = {name: layout for name, layout in LAYOUTS.items() if layout.reading == BARE}
    paths = [make(layout, folders[name]) for name, layout in direct.items()]
    for name in LAYOUTS.keys() - direct.keys():  # what needs a flag is converted first
        speaker = LAYOUTS[name].reading.speaker
        paths.append(folders[name] / "lines.jsonl")
        command = ["convert", str(make(LAYOUTS[name], folders[name])), str(paths[-1])]
        assert prepare([*command, "--speaker", speaker] if speaker else command) == 0
    num_records = sum(len(layout.expected) for layout in LAYOUTS.values())
    flags = {"train_manifest": ",".join(map(str, paths)), "output_dir": tmp_path / "out", "base_ckpt": toys / "checkpoint"}
    flags |= {"audio_tokenizer": codec_dir, "codes_dir": codec_dir / "codes", "batch_size": num_records, "max_steps": 2}
    flags |= ONLY_STEPS | {"mixed_precision": "no", "device": "cpu", "num_workers": 0}
    assert train.main(to_argv(flags)) == 0
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    seconds = [record[4] if len(record) > 3 else 0.4 for layout in LAYOUTS.values() for record in layout.expected]
    frames = [expected_frames(sec, ratios=(8, 10, 12)) for sec in seconds]
    assert [step["audio_targets"] for step in steps] == [8 * sum(count + 1 for count in frames)] * 2  # with the stream's end


# ---- what is not certain is refused, and says which flag settles it

REFUSED = {
    "phonemes only": (
        "wavs/a.wav wavs/b.wav",
        {"list.txt": "wavs/a.wav|ðə fˈɜːst sˈɛntəns|0\nwavs/b.wav|ænd hˈɪə ɪz wˌʌn|1\n"},
        "list.txt",
        "it has phonemes where the model needs the written text .*--columns audio=1,text=2",
    ),
    "pinyin": (
        "wavs/a.wav wavs/b.wav",
        {"list.txt": "wavs/a.wav|guang3 zhou1 nv3 da4\nwavs/b.wav|zun1 zhong4 ke1 xue2\n"},
        "list.txt",
        "it has phonemes",
    ),
    "two texts that differ": (
        "wavs/a.wav wavs/b.wav",
        {"list.txt": f"wavs/a.wav|{ONE}|Der erste Satz ist das.\nwavs/b.wav|{TWO}|Und noch ein Hund!\n"},
        "list.txt",
        r"unclear which field is what .*--columns audio=1,text=2",
    ),
    "speaker and word": (
        "wavs/a.wav",
        {"list.txt": "wavs/a.wav|Hello|anna\n"},
        "list.txt",
        "unclear which field is what",
    ),
    "unknown columns": (
        "a.wav b.wav",
        {"table.csv": f"clip;words;who\na.wav;{ONE};anna\nb.wav;{TWO};ben\n"},
        "",
        None,  # the clips are there and one column is a text: certain enough
    ),
    "two folders that may be speakers": (
        "anna/happy/a.wav anna/sad/b.wav ben/happy/c.wav",
        {"anna/happy/a.txt": ONE, "anna/sad/b.txt": TWO, "ben/happy/c.txt": THREE},
        "",
        "unclear which folder is the speaker .*--speaker_from folder:1",
    ),
    "chapters": (
        "chapter_01/a.wav chapter_02/b.wav",
        {"chapter_01/a.txt": ONE, "chapter_02/b.txt": TWO},
        "",
        "unclear which folder is the speaker",
    ),
    "emotions": (
        "happy/a.wav sad/b.wav",
        {"happy/a.txt": ONE, "sad/b.txt": TWO},
        "",
        r"unclear which folder is the speaker \(happy, sad\)",
    ),
    "milliseconds": (
        "a.wav b.wav",
        {"t.csv": f"audio,text,start,end\na.wav,{ONE},0,150\nb.wav,{TWO},200,400\n"},
        "t.csv",
        r"most spans end after their files: 0 to 150 s of a.wav, which has 0.4 s. Times are in seconds",
    ),
    "a spreadsheet": ("a.wav", {"texts.xlsx": "PK"}, "texts.xlsx", "found a spreadsheet; save it as CSV"),
    "a single recording": ("a.wav", {}, "a.wav", "a recording; name the table .*, or bash launch.sh prepare cut .*a.wav --out cuts.jsonl"),
    "keys of no meaning": (
        "a.wav",
        {"x.jsonl": '{"sound": "a.wav", "said": "Hello."}\n'},
        "x.jsonl",
        r"found keys \['said', 'sound'\], where a table has audio \(audio, .* --columns audio=COLUMN\) and text \(text, ",
    ),
    "two tables": (
        "wavs/a.wav wavs/b.wav",
        {"one.txt": f"a|{ONE}\nb|{TWO}\n", "other.txt": f"a|{TWO}\nb|{ONE}\n"},
        "",
        "one.txt, other.txt all name clips; give the one that counts",
    ),
    "clips alone": ("a.wav b.wav", {}, "", r": 2 \.wav found, no transcripts: bash launch\.sh prepare transcribe "),
    "an archive": ("", {"data.zip": "PK"}, "", "found data.zip, an archive; unpack it first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unclear_is_refused(name, tmp_path):
    clips, files, start, message = REFUSED[name]
    path = make(Layout(clips, files, [], start), tmp_path)
    if message is None:
        assert open_manifest(path)[1].summary()[:3]
        return
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_manifest(path)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["anna", "ben"] * 20, "only 2 different texts in 40 rows, as if they were speakers or labels"),
        ([str(number) for number in range(40)], "no sentences, but numbers"),
        ([f"{number}.wav" for number in range(40)], "names of files"),
        (["ðə fˈɜːst sˈɛntəns"] * 3, "these are phonemes"),
        (["angry", "happy"] * 2, "no sentences, but labels"),
    ],
)
def test_texts_that_are_none_are_refused(texts, message, tmp_path, capsys):
    """They stand in a column with a usual name. Who names the column decides."""
    make(Layout(" ".join(f"{number}.wav" for number in range(len(texts))), {}, []), tmp_path)
    rows = [{"audio": f"{number}.wav", "text": text} for number, text in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(["check", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"text from `text`: {message}" in said or ("text from `text`: these are" in said and message in said)
    assert "--columns text=COLUMN" in said
    assert len(open_manifest(path, reading=Reading(columns={"text": "text"}))[0]) == len(texts)


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_clip_that_was_cut_already_is_not_cut_again(tmp_path, capsys):
    make(Layout("a.wav b.wav", {}, []), tmp_path)
    rows = [{"audio": f"{name}.wav", "text": ONE, "start": at, "end": at + 0.4} for name, at in (("a", 12.0), ("b", 15.5))]
    path, out = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
    assert prepare(["convert", str(path), str(out)]) == 2
    assert "is 0.4 s long, as is its span from 12 s on: the clips have been cut already" in capsys.readouterr().err
    assert prepare(["convert", str(path), str(out), "--columns", "offset=none,end=none"]) == 0
    assert all("offset" not in part for part in (json.loads(line)["messages"][-1]["content"] for line in out.open()))


def test_names_that_are_no_speakers_are_left_out(tmp_path, capsys):
    make(Layout("a.wav b.wav c.wav", {}, []), tmp_path)
    speakers = {"a": "N/A", "b": "train", "c": "anna"}
    rows = [{"audio": f"{name}.wav", "text": ONE + name, "speaker": speaker} for name, speaker in speakers.items()]
    records, conversion = open_manifest(write_rows(tmp_path / "rows.jsonl", *rows))
    assert [record.chatml.speaker for record in records] == [None, None, "anna"]
    assert conversion.repairs["'train' is not the name of a speaker: left out"] == 1
    assert "2 clips have no speaker" in conversion.summary()


def test_conversion_says_what_became_what(tmp_path, capsys):
    """And check says the same."""
    files = {"metadata.csv": "".join(f"{i}|{ONE if i < 5 else f'Sentence {i} is this.'}\n" for i in range(9))}
    folder = make(Layout(" ".join(f"wavs/{i}.wav" for i in range(9)), files, []), tmp_path / "set")
    assert prepare(["convert", str(folder), str(tmp_path / "out.jsonl")]) == 0
    converted = capsys.readouterr().out
    assert prepare(["check", str(folder)]) == 0
    checked = capsys.readouterr().out
    for line in (
        "audio    field 1",
        "text     field 2",
        "speaker  none",
        f'example  wavs/0.wav | "{ONE}" | no speaker',
        "no clip has a speaker",
        f'5 clips have the same text: "{ONE}"',
        "speakers no speaker 0.1 min",
    ):
        assert line in converted and line in checked


def test_the_flags_that_settle_it(tmp_path, capsys):
    """--columns by name and by number, --speaker, --speaker_from, --audio_root, --missing_text, --split."""
    clips = make(Layout("x/anna/a.wav x/ben/b.wav", {}, []), tmp_path / "clips")
    text = f"file_id,said,kind\nx/anna/a.wav,{ONE},train\nx/ben/b.wav,,test\n"
    table, out = tmp_path / "t.csv", tmp_path / "out.json"
    table.write_text(text)

    def convert(*flags: str) -> list[dict]:
        assert prepare(["convert", str(table), str(out), "--audio_root", str(clips), "--normalize", "no", *flags]) == 0
        return json.loads(out.read_text())  # a name in .json is a list

    columns = ("--columns", "audio=file_id,text=said,split=kind")
    (record,) = convert(*columns, "--missing_text", "skip", "--speaker_from", "folder:2")
    assert record["messages"][-2]["content"] == ONE and record["speaker"] == "anna" and record["misc"]["split"] == "train"
    assert record["messages"][-1]["content"]["audio_url"] == "clips/x/anna/a.wav"
    assert "1 rows without a text were skipped" in capsys.readouterr().out
    (record,) = convert(*columns, "--missing_text", "skip", "--speaker_from", r"regex:(\w)\.wav")
    assert record["speaker"] == "a"
    (record,) = convert(*columns, "--split", "train", "--speaker", "someone", "--missing_text", "skip")
    assert record["speaker"] == "someone"
    table.write_text(f"x/anna/a.wav|{ONE}|{TWO}\n")
    (record,) = convert("--columns", "audio=1,text=3,speaker=none")
    assert record["messages"][-2]["content"] == TWO
    for flags, message in (
        (["--columns", "audio=9,text=2"], "--columns audio=9: its first line has 3 fields"),
        (["--columns", "sound=1"], "--columns sound=1: expected audio=COLUMN,text=COLUMN"),
        (["--speaker_from", "folder:zero"], "expected folder:1, folder:-1, or regex:PATTERN"),
        (["--columns", "text=2", "--speaker_from", "folder:7"], "--speaker_from folder:7, but x/anna/a.wav has 2 folders"),
        (["--audio_root", "nowhere"], "--audio_root nowhere: no such folder"),
        (["--columns", "text=2", "--split", "dev"], "--split dev: no record of this split; its splits are: none"),
        (["--scene_share", "2"], "between 0 and 1"),
    ):
        assert prepare(["convert", str(table), str(out), "--audio_root", str(clips), *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_prepared_set_moves_to_another_machine(tmp_path):
    """Absolute paths that are gone are found again below --audio_root, in tables and in ChatML."""
    folder = make(Layout("set/wavs/a.wav", {}, []), tmp_path)
    table = tmp_path / "train.list"
    table.write_text(f"D:\\data\\set\\wavs\\a.wav|anna|EN|{ONE}\n")
    reading = Reading(normalize=False, phrasing=None, audio_root=folder)
    assert records_of(table, folder, reading) == [("set/wavs/a.wav", ONE, "anna")]
    messages = [
        {"role": "user", "content": ONE},
        {"role": "assistant", "content": {"type": "audio", "audio_url": "/old/set/wavs/a.wav"}},
    ]
    chatml = write_rows(tmp_path / "train.jsonl", {"messages": messages})
    assert prepare(["convert", str(chatml), str(tmp_path / "new" / "train.jsonl"), "--audio_root", str(folder)]) == 0
    (record,) = check(read_manifest(tmp_path / "new" / "train.jsonl"))[0]
    assert record.audio[0].path.samefile(folder / "set/wavs/a.wav")


def test_references_scene_and_system_are_read_as_generate_reads_them(tmp_path):
    make(Layout("a.wav r.wav s.wav", {}, []), tmp_path)
    row = {"audio": "a.wav", "text": f"[SPEAKER0] {ONE} [SPEAKER1] {TWO}", "ref_audio": ["r.wav", "s.wav"]}
    rows = [
        row | {"ref_text": ["One.", "Two."], "scene": "A street."},
        row | {"ref_audio": ["r.wav", "profile: An old man."]},
        {"audio": "a.wav", "text": ONE, "ref_audio": "r.wav", "ref_text": "One.", "system": "Slowly."},
        {"audio": "a.wav", "text": ONE, "system": ""},
    ]
    made = [record.chatml.messages for record in open_manifest(write_rows(tmp_path / "rows.jsonl", *rows), reading=BARE)[0]]
    assert made[0][0].content == f"{prompts.INSTRUCTION}\n\n<|scene_desc_start|>\nA street.\n<|scene_desc_end|>"
    assert [turn.content for turn in made[0][1::2]] == ["[SPEAKER0] One.", "[SPEAKER1] Two.", row["text"]]
    assert made[1][0].content[-1].text == "\nSPEAKER1: An old man.\n<|scene_desc_end|>"
    assert made[2][0].content == "Slowly." and len(made[2]) == 5 and len(made[3]) == 2
    for wrong, message in (
        ({"ref_text": ["One."]}, "2 ref_audio but 1 ref_text; give every transcript, or none"),
        ({"system": "Slowly."}, "replaces the one that holds reference clips without transcripts"),
    ):
        with pytest.raises(DataError, match=f"rows.jsonl record 0 .*{message}"):
            open_manifest(write_rows(tmp_path / "rows.jsonl", row | wrong))


# ---- phrasing and texts


def test_rows_are_phrased_as_inference_phrases_them(tmp_path):
    """In a mixture that depends on the seed and the record alone; reading twice gives the same."""
    make(Layout("a.wav r.wav", {}, []), tmp_path)
    rows = [{"audio": "a.wav", "text": f"This is sentence {number}."} for number in range(400)]
    rows += [row | {"ref_audio": "r.wav", "ref_text": "What is said there"} for row in rows]
    path = write_rows(tmp_path / "rows.jsonl", *rows)

    def turns(**shares) -> list:
        records = open_manifest(path, reading=Reading(phrasing=prompts.Phrasing(**shares)))[0]
        return [record.chatml.messages for record in records]

    made = turns()
    assert made == turns() != turns(seed=1)
    alone, cloned = made[:400], made[400:]
    scene = f"{prompts.INSTRUCTION}\n\n<|scene_desc_start|>\n{prompts.QUIET_ROOM}\n<|scene_desc_end|>"
    kinds = Counter(messages[0].content for messages in alone)
    assert set(kinds) == {prompts.INSTRUCTION, scene} and 160 < kinds[scene] < 240
    exchanges = [messages for messages in cloned if messages[-4:][0].content == "What is said there"]
    assert 250 < len(exchanges) < 310  # wanted are 280
    assert 100 < sum(messages[0].content == scene for messages in exchanges) < 180
    in_system = [messages for messages in cloned if isinstance(messages[0].content, list)]
    assert len(in_system) + len(exchanges) == 400
    assert all(messages[0].content == prompts.INSTRUCTION for messages in turns(scene_share=0)[:400])
    assert all(isinstance(messages[0].content, list) for messages in turns(system_share=1)[400:])


def test_texts_of_rows_are_normalised_and_chatml_is_not(tmp_path, capsys):
    make(Layout("a.wav r.wav", {}, []), tmp_path)
    row = {"audio": "a.wav", "text": "你好，世界 [laugh] 20°C", "ref_audio": "r.wav", "ref_text": "你好，世界"}
    path, out = write_rows(tmp_path / "rows.jsonl", row), tmp_path / "out.jsonl"
    assert prepare(["convert", str(path), str(out), "--system_share", "0"]) == 0
    said = capsys.readouterr().out
    assert "1 x texts were changed as upstream's example does" in said
    assert f'changed  "{row["text"]}" -> "你好, 世界 <SE>[Laughter]</SE> 20 degrees Celsius."' in said
    record = json.loads(out.read_text())
    assert record["messages"][-2]["content"] == "你好, 世界 <SE>[Laughter]</SE> 20 degrees Celsius."
    assert record["misc"]["text"] == row["text"] and record["messages"][-4]["content"] == row["ref_text"]
    assert prepare(["convert", str(path), str(out), "--normalize", "no"]) == 0
    assert json.loads(out.read_text())["messages"][-2]["content"] == row["text"]
    chatml = write_rows(tmp_path / "chatml.jsonl", {"messages": [turn | {} for turn in record["messages"][-2:]]})
    chatml.write_text(chatml.read_text().replace(" <SE>[Laughter]</SE> 20 degrees Celsius.", "（笑）"))
    messages = open_manifest(chatml)[0][0].chatml.messages
    assert [turn.role for turn in messages] == ["user", "assistant"] and messages[0].content == "你好, 世界（笑）"


# ---- audio inside other files


def sound(tmp_path: Path, number: int) -> bytes:
    path = tmp_path / f"sound{number}.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(6400) / (9 + number)), 16000)
    return path.read_bytes()


def convert_packed(source: Path, folder: Path) -> list[tuple]:
    """(bytes of the clip, text, speaker, split) of each record after `prepare convert`, which may be run again."""
    out = folder / "lines.jsonl"
    for _ in range(2):
        assert prepare(["convert", str(source), str(out), "--normalize", "no", "--scene_share", "0"]) == 0
    found = []
    for record in check(read_manifest(out))[0]:
        assert record.audio[-1].path.parent == folder / "lines_audio"
        chatml = record.chatml
        content = record.audio[-1].path.read_bytes()
        found.append((content, chatml.messages[-2].content, chatml.speaker, (chatml.misc or {}).get("split")))
    return found


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_hugging_face_datasets_are_unpacked(kind, tmp_path, capsys):
    """`{bytes, path}` audio as the Hub keeps it, and as `save_to_disk` writes it."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet and Arrow need pyarrow")
    parquet, ipc = (importlib.import_module(f"pyarrow.{name}") for name in ("parquet", "ipc"))
    sounds = [sound(tmp_path, number) for number in range(2)]
    audio = [{"bytes": sounds[0], "path": "a.wav"}, {"bytes": sounds[1], "path": None}]
    table = pyarrow.table({"audio": audio, "text": [ONE, TWO], "speaker_id": [7, 8]})
    folder = tmp_path / "set" / ("data" if kind == "parquet" else "train")
    folder.mkdir(parents=True)
    if kind == "parquet":
        parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    else:
        with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table)
        (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds the audio itself; unpack it: bash launch.sh prepare convert .* lines.jsonl"):
        open_manifest(tmp_path / "set")
    assert convert_packed(tmp_path / "set", tmp_path) == [(sounds[0], ONE, "7", "train"), (sounds[1], TWO, "8", "train")]
    (folder / "broken.parquet").write_bytes(b"PAR1")
    assert prepare(["convert", str(folder / "broken.parquet"), str(tmp_path / "x.jsonl")]) == 2
    assert "broken.parquet: cannot be read" in capsys.readouterr().err


def test_tar_shards_are_unpacked(tmp_path):
    """As Emilia has them; names in a shard do not say where anything is written."""
    sounds = [sound(tmp_path, number) for number in range(2)]
    with tarfile.open(tmp_path / "EN-B000.tar", "w") as shard:
        for name, content in {
            "../EN_1.json": json.dumps({"text": ONE, "speaker": "EN_s1", "wav": "EN_1.mp3"}).encode(),
            "../EN_1.wav": sounds[0],
            "x/EN_2.wav": sounds[1],
            "x/EN_2.txt": TWO.encode(),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    assert convert_packed(tmp_path / "EN-B000.tar", tmp_path) == [(sounds[0], ONE, "EN_s1", None), (sounds[1], TWO, None, None)]
    assert not (tmp_path.parent / "EN_1.wav").exists()


# ---- two-channel calls


def test_each_channel_of_a_call_becomes_a_file(tmp_path, capsys):
    """A row names the channel that its text is in; otherwise both would be mixed."""
    time, out = np.arange(16000), tmp_path / "lines.jsonl"
    left, right = (0.1 * np.sin(time / slow) for slow in (9, 14))
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", left, 16000, subtype="FLOAT")
    turns = [(ONE, 0.0, 0.5), (TWO, 0.5, 1.0)]

    def rows(*channels, audio: str = "call.wav") -> Path:
        values = [{"audio": audio, "text": t, "start": a, "end": b, "channel": c} for (t, a, b), c in zip(turns, channels)]
        return write_rows(tmp_path / "rows.jsonl", *values)

    for channels in ((0, 1), (1, 2), ("left", "right"), ("A", "B")):
        assert prepare(["convert", str(rows(*channels)), str(out)]) == 0
        clips = [record.audio[0] for record in check(read_manifest(out))[0]]
        assert [(clip.offset_sec, clip.duration_sec) for clip in clips] == [(0.0, 0.5), (0.5, 0.5)]
        for clip, samples in zip(clips, (left, right)):
            assert clip.path.parent == tmp_path / "lines_audio"
            assert np.abs(soundfile.read(clip.path)[0] - samples).max() < 1e-6
    mono = open_manifest(rows(1, 1, audio="mono.wav"), reading=BARE)[0]
    assert [record.audio[0].path.name for record in mono] == ["mono.wav"] * 2
    for channels, message in (
        ((1, 1), "channel 1 may be the left or the right one"),
        ((0, 3), "call.wav has 2 channels; expected 0 and 1"),
    ):
        assert prepare(["convert", str(rows(*channels)), str(out)]) == 2
        assert message in capsys.readouterr().err
    assert prepare(["check", str(rows(0, 1))]) == 2
    assert "call.wav has 2 channels; part them: bash launch.sh prepare convert" in capsys.readouterr().err
    (tmp_path / "wav.scp").write_text("a sph2pipe -f wav -p -c 2 call.wav |\n")
    (tmp_path / "text").write_text(f"a {ONE}\n")
    assert prepare(["convert", str(tmp_path / "wav.scp"), str(out)]) == 0
    (record,) = check(read_manifest(out))[0]
    assert np.abs(soundfile.read(record.audio[0].path)[0] - right).max() < 1e-6


# ---- packages that few need, and the Hub


def test_a_missing_package_is_installed_or_named(tmp_path, monkeypatch, capfd):
    """With the real pip, which finds nothing here."""
    monkeypatch.setattr(packed, "REQUIREMENTS", tmp_path / "requirements.txt")
    packed.REQUIREMENTS.write_text("no-package-of-this-name\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="needs the package nothing_here, .* pip install -r .*requirements.txt"):
        packed.optional("nothing_here")
    assert "installing nothing_here" in capfd.readouterr().err


def test_datasets_of_the_hub(tmp_path, monkeypatch, capsys):
    """The Hub is not there in tests; its cache on this machine is, in which downloads are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "datasets--owner--name"
    snapshot = make(LAYOUTS["audio folder with splits"], cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    assert records_of("owner/name", snapshot, BARE) == [("test/b.wav", TWO, None), ("train/a.wav", ONE, None)]
    assert records_of("owner/name/train", snapshot, BARE) == [("train/a.wav", ONE, None)]
    assert prepare(["check", "owner/name"]) == 0
    (tmp_path / "recordings").mkdir()
    for missing, message in {
        "owner/other": "no file or folder owner/other here; owner/other: HF_HUB_OFFLINE is set",
        "owner/name/dev": "owner/name has no folder dev",
        "recordings/anna": "recordings/anna: no such manifest file or folder",
        "data/train.jsonl": "data/train.jsonl: no such manifest file or folder",
    }.items():
        assert prepare(["convert", missing, "lines.jsonl"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
def test_what_libsndfile_does_not_read_goes_through_ffmpeg(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.wav").write_bytes(sound(tmp_path, 0))
    for name in ("a.m4a", "b.webm"):
        subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / name], check=True)
    path = write_rows(tmp_path / "rows.jsonl", *({"audio": name, "text": f"{name}: {ONE}"} for name in ("a.m4a", "b.webm")))
    for record in open_manifest(path)[0]:
        assert duration_sec(record.audio[0]) == pytest.approx(0.4, abs=0.15)
    assert prepare(["check", str(path)]) == 0
    (tmp_path / "a.m4a").write_bytes(b"no audio at all")
    assert prepare(["check", str(path)]) == 1
    assert "a.m4a is not readable audio: ffmpeg: " in capsys.readouterr().out
    monkeypatch.setenv("PATH", "")
    assert prepare(["check", str(path)]) == 1
    assert ".webm needs ffmpeg, which is not installed; or: ffmpeg -i b.webm b.wav" in capsys.readouterr().out


def test_the_documentation_lists_the_same_layouts():
    text = (Path(__file__).parent.parent / "docs" / "datasets.md").read_text(encoding="utf-8")
    listed = text.split("| layout |")[1].split("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in listed] == list(LAYOUTS)
    assert len(LAYOUTS) >= 40
    for meaning, names in COLUMNS.items():
        assert f"| {meaning} | {', '.join(f'`{name}`' for name in names)} |" in text
