"""Shared by all tests: tiny checkpoints of the real classes, ChatML records from toy voices, and gloo ranks."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from queue import Empty

import pytest
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel

import data
from prepare.audio import AudioStore
from prepare.manifest import read_manifest
from process.signals import SIGNALS
from tools import toys as demo

ROOT = Path(__file__).parent.parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
os.environ["UNSEEN_GPU_IS_FINE"] = "1"  # tests run on the CPU there
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that tests start


ONLY_STEPS = {"warmup_steps": 0, "val_steps": 0, "sample_steps": 0, "save_steps": 0}  # instead of once per epoch


@pytest.fixture(autouse=True)
def no_process_group_left():
    """Each test ends without the process group that a run in this process made."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Path:
    """A demo folder with few records: train.jsonl, val.jsonl, test.jsonl, checkpoint/."""
    folder = tmp_path_factory.mktemp("toys")
    demo.make_demo(folder, seed=1, num_speakers=31)
    return folder


@pytest.fixture(scope="session")
def checkpoint_dir(toys) -> Path:
    return toys / "checkpoint"


@pytest.fixture(scope="session")
def codec_files(tmp_path_factory) -> Path:
    """A small codec of the official class with random weights, and the HuBERT that it loads by a relative name."""
    pytest.importorskip("vector_quantize_pytorch", reason="needs requirements-codec.txt")
    return demo.make_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture()
def codec_dir(codec_files, monkeypatch) -> Path:
    """The same, and the current folder, so that the codec finds its HuBERT."""
    monkeypatch.chdir(codec_files)
    return codec_files


@pytest.fixture(scope="session")
def judges(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a speech recogniser and a speaker verifier: real classes of transformers, tiny, with random weights."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
        WavLMConfig,
        WavLMForXVector,
    )  # fmt: skip

    asr, sv = tmp_path_factory.mktemp("asr"), tmp_path_factory.mktemp("sv")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    size |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    extractor = Wav2Vec2FeatureExtractor()
    (asr / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(["<pad>", "<unk>", "|", *"abcdefg"])}))
    tokenizer = Wav2Vec2CTCTokenizer(str(asr / "vocab.json"), pad_token="<pad>", unk_token="<unk>")
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(asr)
    torch.manual_seed(0)
    Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=10, **size)).save_pretrained(asr)
    WavLMForXVector(WavLMConfig(tdnn_dim=(16, 16, 32), tdnn_kernel=(3, 1, 1), tdnn_dilation=(1, 1, 1), **size)).save_pretrained(
        sv
    )
    extractor.save_pretrained(sv)
    return asr, sv


@pytest.fixture(scope="session")
def whisper_dir(tmp_path_factory) -> Path:
    """A tiny Whisper of the real classes with random weights, that has to be told or to guess its language."""
    from tokenizers import pre_tokenizers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )  # fmt: skip

    folder = tmp_path_factory.mktemp("whisper")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    special = ["<|startoftranscript|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*special, "<|endoftext|>")}
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    size |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "max_target_positions": 16}
    end = {"pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|endoftext|>"], "bos_token_id": ids["<|endoftext|>"]}
    end |= {"decoder_start_token_id": ids["<|startoftranscript|>"]}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=len(tokenizer), suppress_tokens=[], **end, **size))
    model.generation_config = GenerationConfig(
        is_multilingual=True, lang_to_id={token: ids[token] for token in ("<|en|>", "<|zh|>")}, max_length=12,
        task_to_id={task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")},
        no_timestamps_token_id=ids["<|notimestamps|>"], prev_sot_token_id=ids["<|startofprev|>"], **end,
    )  # fmt: skip
    for part in (model, tokenizer, WhisperFeatureExtractor(feature_size=8)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def talking_whisper(whisper_dir, tmp_path_factory) -> Path:
    """The tiny Whisper, kept from all tokens but some letters."""
    folder = tmp_path_factory.mktemp("talking") / "whisper"
    shutil.copytree(whisper_dir, folder)
    letters = {number for letter, number in json.loads((folder / "vocab.json").read_text()).items() if letter in "abcdefgh"}
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"suppress_tokens": [i for i in range(1765) if i not in letters]}
    path.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return demo.make_tokenizer()


@pytest.fixture()
def config(tokenizer) -> HiggsAudioConfig:
    return demo.tiny_config(tokenizer)


def make_model(config: HiggsAudioConfig, seed: int = 0) -> HiggsAudioModel:
    """A randomly initialised model, its norms too, so that no branch is the identity."""
    torch.manual_seed(seed)
    model = HiggsAudioModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def loud_dir(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint whose norms are random too: its answers depend on everything in the prompt."""
    folder = tmp_path_factory.mktemp("loud")
    make_model(demo.tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_sample(tokenizer, *turns, start_index: int | None = None, seed: int = 0) -> ChatMLDatasetSample:
    """A sample from ("user", "text"), ("assistant", T) turns, where a number is a clip of so many random frames."""
    from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
    from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample

    generator = torch.Generator().manual_seed(seed)
    messages, codes = [], []
    for role, *parts in turns:
        content = []
        for part in parts:
            if isinstance(part, str):
                content.append(TextContent(part))
            else:
                content.append(AudioContent(audio_url=""))
                codes.append(torch.randint(0, 64, (8, part), generator=generator))
        messages.append(Message(role, content))
    input_ids, label_ids, *_ = prepare_chatml_sample(ChatMLSample(messages, start_index=start_index), tokenizer)
    lengths = torch.tensor([0] + [c.shape[1] for c in codes])
    return ChatMLDatasetSample(
        input_ids=torch.tensor(input_ids),
        label_ids=torch.tensor(label_ids),
        audio_ids_concat=torch.cat(codes, dim=1) if codes else torch.zeros((8, 0), dtype=torch.long),
        audio_ids_start=lengths.cumsum(0)[:-1],
        audio_waveforms_concat=torch.zeros(0),
        audio_waveforms_start=torch.zeros(0, dtype=torch.long),
        audio_sample_rate=torch.zeros(0),
        audio_speaker_indices=torch.zeros(0, dtype=torch.long),
    )


def flat(sums) -> torch.Tensor:
    """All values of a `loss.Summable` in one vector, without gradient."""
    values: list[torch.Tensor] = []
    sums.map(values.append)
    return torch.cat([value.detach().flatten() for value in values])


CASES = {
    "single": [[("user", "hello"), ("assistant", 9)]],
    "padded": [[("user", "hi"), ("assistant", 4)], [("user", "a much longer text"), ("assistant", 12)]],
    "multi-segment": [
        [("user", "one"), ("assistant", 5), ("user", "two"), ("assistant", 1), ("user", "three"), ("assistant", 8)],
        [("user", "four"), ("assistant", "words, then", 6, "and", 3)],
    ],
    "reference and target": [
        [("system", "voice: ", 6, "."), ("user", "speak"), ("assistant", 7)],
        [("user", "ref"), ("assistant", 5), ("user", "new"), ("assistant", 7)],
    ],
    "text-only": [[("user", "say it"), ("assistant", "it")], [("user", "more"), ("assistant", "and more words")]],
}


def case_samples(name: str, tokenizer) -> list[ChatMLDatasetSample]:
    return [make_sample(tokenizer, *turns, seed=i) for i, turns in enumerate(CASES[name])]


def write_manifest(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def open_dataset(manifest: Path, config: HiggsAudioConfig, tokenizer) -> data.ChatMLDataset:
    store = AudioStore(config.audio_num_codebooks, config.audio_codebook_size, 25.0, manifest.parent / "codes")
    return data.ChatMLDataset(read_manifest(manifest), tokenizer, store)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train", "tools.toys"])


def run_ranks(function, world_size: int, *args, timeout_sec: int = 120) -> list:
    """Run `function(dist, *args)` on gloo ranks, each its own process, and return what each returned.

    `function` and `args` are pickled by reference and value. A rank that fails shows its traceback here.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    queue = _context.Queue()
    ranks = [
        _context.Process(target=_rank_main, args=(queue, rank, world_size, port, timeout_sec, function, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results = {}
    try:
        while len(results) < world_size:
            try:
                rank, ok, value = queue.get(timeout=1)
            except Empty:
                dead = [r for r, process in enumerate(ranks) if process.exitcode is not None and r not in results]
                assert not dead or not queue.empty(), f"ranks {dead} ended without a result"
                continue
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = pickle.loads(value)  # plain bytes: the queue would share tensors with a process that is gone
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank_main(queue, rank: int, world_size: int, port: int, timeout_sec: int, function, args) -> None:
    faulthandler.dump_traceback_later(timeout_sec - 5, exit=True)  # a hang shows where
    sys.path.insert(0, str(ROOT))
    for number in SIGNALS:  # a loader's server, which may have started this process, ignores them
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    import train

    try:
        queue.put((rank, True, pickle.dumps(function(train.setup_distributed("cpu"), *args))))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


# Files that take longest, first: with several processes (`--dist loadfile`), a long one at the end would run alone.
LONG = ("readme", "resume", "signals", "train", "distributed", "faults", "plan", "stopped", "elastic", "audio", "samples")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}.py" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))
