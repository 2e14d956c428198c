"""The two layouts: a round trip is bit-equal, training reads either, and the transformers class agrees with our loss."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import soundfile
import torch
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from conftest import ROOT, make_model
from make_golden import GOLDEN, PUBLISHED_ROPE, ask_native, golden_config, make_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_codec import write_wav
from test_collate import TOWER
from test_export import error, same, settings, weights

import loss
import model_patch
import train
from common import CheckpointError
from config import BASE_CKPT, BASE_REVISION
from export import layouts, merge, pretrained, read, write
from prepare import prompts
from prepare.manifest import parse_record
from tools import toys as demo

# The Hub states the published rotary scaling in the newer layout in other numbers than in the original one.
RESTATED_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 0.5,
    "low_freq_factor": 0.125,
    "original_max_position_embeddings": 1024,
    "rope_theta": 500000.0,
    "rope_type": "llama3",
}


@pytest.fixture(scope="module")
def boson(tmp_path_factory) -> Path:
    """A checkpoint in bfloat16 in the original layout, with the rotary scaling of the published one."""
    folder = tmp_path_factory.mktemp("layouts") / "boson"
    demo.make_checkpoint(folder)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= PUBLISHED_ROPE
    (folder / "config.json").write_text(json.dumps(values | {"torch_dtype": "bfloat16"}))
    tensors = {name: tensor.bfloat16() for name, tensor in weights(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def newer(boson) -> Path:
    folder = boson.parent / "transformers"
    merge.convert(read.open_model(boson), folder, "transformers")
    return folder


def test_a_round_trip_is_bit_equal(boson, newer, tmp_path, monkeypatch):
    """Tensors, configuration and tokenizer; also where the weights are divided into several files with an index."""
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 500_000)
    merge.convert(read.open_model(boson), tmp_path / "newer", "transformers")
    assert len(list((tmp_path / "newer").glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "newer" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(newer).keys()
    merge.convert(read.open_model(tmp_path / "newer"), tmp_path / "back")
    assert same(weights(tmp_path / "newer"), weights(newer)) and same(weights(tmp_path / "back"), weights(boson))
    assert len(weights(boson)) == len(HiggsAudioModel.from_pretrained(boson).state_dict())

    before, after = (HiggsAudioConfig.from_pretrained(folder).to_dict() for folder in (boson, tmp_path / "back"))
    before["audio_encoder_config"] = after["audio_encoder_config"] = None  # of a tower that neither has
    before["text_config"]["torch_dtype"] = after["text_config"]["torch_dtype"] = None
    assert before == after
    words = "Generate audio<|audio_out_bos|><|AUDIO_OUT|>, ä!"
    assert len({tuple(pretrained.load_tokenizer(folder).encode(words)) for folder in (boson, newer, tmp_path / "back")}) == 1
    loaded = HiggsAudioModel.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, weights(boson)[name].float()) for name, tensor in loaded.items())


def test_the_newer_configuration(boson, newer):
    values = json.loads((newer / "config.json").read_text())
    assert (values["model_type"], values["codebook_size"], values["num_codebooks"]) == ("higgs_audio_v2", 66, 8)
    assert values["architectures"] == ["HiggsAudioV2ForConditionalGeneration"] and values["dtype"] == "bfloat16"
    tokenizer = pretrained.load_tokenizer(boson)
    assert values["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert values["audio_delay_token_id"] == tokenizer.convert_tokens_to_ids("<|AUDIO|>"), "no token to spare for it"
    tokenizer.add_tokens([layouts.DELAY_TOKEN])
    values = layouts.to_transformers(HiggsAudioConfig.from_pretrained(boson), tokenizer)
    assert values["audio_delay_token_id"] == len(tokenizer) - 1
    generation = json.loads((newer / "generation_config.json").read_text())
    assert (generation["ras_win_len"], generation["eos_token_id"]) == (7, values["eos_token_id"])


CLIP = {"type": "audio", "audio_url": "a.wav"}
EXCHANGE = [{"role": "user", "content": "what it says"}, {"role": "assistant", "content": [{"type": "audio", "url": "a.wav"}]}]
QUESTION = {"role": "user", "content": "  What shall I say?"}


@pytest.mark.parametrize(
    ("conversation", "voices", "scene"),
    [
        ([{"role": "system", "content": prompts.INSTRUCTION}], [], ""),
        ([{"role": "system", "content": prompts.INSTRUCTION}, {"role": "scene", "content": "A room."}], [], "A room."),
        (EXCHANGE, [prompts.Voice(CLIP, "what it says")], ""),
        (
            [
                {"role": "system", "content": [{"type": "text", "text": prompts.INSTRUCTION}]},
                {"role": "scene", "content": [{"type": "text", "text": "A room."}, {"type": "text", "text": "SPEAKER0:"}, CLIP,
                                              {"type": "text", "text": "SPEAKER1: deep"}]},
            ],
            [prompts.Voice(CLIP), prompts.Voice(profile="deep")],
            "A room.",
        ),
    ],
)  # fmt: skip
def test_the_chat_template_writes_our_prompts(conversation, voices, scene, newer, tmp_path):
    """Token for token what `prepare_chatml_sample` makes of our phrasing; clips of the system turn have one token in the
    newer layout, and the answer is made to begin with audio."""
    tokenizer = pretrained.load_tokenizer(newer)
    template = (newer / "chat_template.jinja").read_text()
    made = tokenizer.apply_chat_template([*conversation, QUESTION], chat_template=template, add_generation_prompt=True)
    turns = [*prompts.context(QUESTION["content"], voices, scene), QUESTION]
    (tmp_path / "a.wav").touch()
    ours, *_ = prepare_chatml_sample(parse_record({"messages": turns}, tmp_path, "here", to_train=False).chatml, tokenizer)
    audio_in, audio_out = tokenizer.convert_tokens_to_ids(["<|AUDIO|>", "<|AUDIO_OUT|>"])
    answer = tokenizer.encode("<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>", add_special_tokens=False)
    assert made == [audio_out if token == audio_in else token for token in ours] + answer


def test_files_of_the_processor(boson, newer, tmp_path):
    """Written where the base has none, kept where it has; the processor pads."""
    values = json.loads((newer / "processor_config.json").read_text())
    assert (values["audio_stream_eos_id"], values["audio_delay_token"]) == (65, "<|AUDIO|>")
    assert not (boson / "processor_config.json").exists() and not (boson / "chat_template.jinja").exists()
    shutil.copytree(newer, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("mine")
    settings = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own" / "special_tokens_map.json").unlink()
    merge.convert(read.open_model(tmp_path / "own"), tmp_path / "again", "transformers")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "mine"
    assert pretrained.load_tokenizer(tmp_path / "again").pad_token == "<|end_of_text|>"


def test_rotary_frequencies_agree(boson, newer):
    """1024 positions for 8192, and factors an eighth as large: the same frequencies, to the bit."""

    def frequencies(values: dict) -> torch.Tensor:
        config = layouts.to_boson(values, pretrained.load_tokenizer(newer))
        model = model_patch.build_on_meta(config)
        model_patch.materialize(model, torch.device("cpu"))
        return model.rotary_emb.inv_freq

    values = json.loads((newer / "config.json").read_text())
    original = frequencies(values)
    assert torch.equal(frequencies(values | {"rope_parameters": RESTATED_ROPE}), original)
    default = {"rope_type": "default", "rope_theta": 500000.0}
    assert not torch.equal(frequencies(values | {"rope_parameters": default}), original)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_training_starts_from_either(lora_r, boson, newer, toys, tmp_path):
    """--base_ckpt reads both, with the tokenizer as transformers >= 5 saves it, and with the heads stored twice."""
    folder = tmp_path / "hub"
    folder.mkdir()
    tensors = weights(newer)
    for kind in ("text", "audio"):
        tensors[f"audio_decoder_proj.{kind}_lm_head.weight"] = tensors[f"{kind}_lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text((newer / name).read_text())
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    written = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|AUDIO|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(ends | written | {"clean_up_tokenization_spaces": False}))
    for base in (boson, folder):
        argv = settings(toys, tmp_path / f"from-{base.name}", base_ckpt=base, lora_r=lora_r, max_steps=1, save_steps=0)
        assert train.main(argv) == 0
    finals = [weights(tmp_path / f"from-{name}" / "final") for name in ("boson", "hub")]
    assert same(*finals)
    if not lora_r:
        HiggsAudioModel.from_pretrained(tmp_path / "from-hub" / "final")


def test_the_hub_gives_the_pinned_revision(boson, newer, tmp_path, monkeypatch):
    """Through the Hub client and its cache, offline: the original layout by default, the newer one when it is asked for."""
    cache = tmp_path / f"models--{BASE_CKPT.replace('/', '--')}" / "snapshots"
    shutil.copytree(boson, cache / BASE_REVISION)
    shutil.copytree(newer, cache / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = [pretrained.find_base(BASE_CKPT, revision) for revision in (None, "a" * 40)]
    assert [folder.name for folder in found] == [BASE_REVISION, "a" * 40]
    assert [layouts.layout_of(folder) for folder in found] == ["boson", "transformers"]
    with pytest.raises(CheckpointError, match=r"revision bbbb.*HF_HUB_OFFLINE is set and .* holds no copy"):
        pretrained.find_base(BASE_CKPT, "b" * 40)


def test_what_cannot_be_mapped(newer, tmp_path, capsys):
    """A checkpoint without its text head, an incomplete configuration, an audio tower: named, with what to do."""
    headless, partial, heard = tmp_path / "headless", tmp_path / "partial", tmp_path / "tower"
    for folder in (headless, partial):
        folder.mkdir()
        for path in newer.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = weights(newer)
    del tensors["text_lm_head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    model = model_patch.build_on_meta(pretrained.read_base_config(headless))
    with pytest.raises(
        CheckpointError, match=r"first audio_decoder_proj\.text_lm_head\.weight; .*use_text_head=True"
    ):
        pretrained.check_base(model, headless)
    values = json.loads((newer / "config.json").read_text())
    del values["rope_parameters"]
    (partial / "config.json").write_text(json.dumps(values))
    assert "config.json lacks rope_parameters" in error(capsys, "export", partial, tmp_path / "m")
    demo.make_checkpoint(heard, audio_encoder_config=dict(TOWER), skip_audio_tower=False)
    assert "cannot hold an audio tower" in error(capsys, "export", heard, tmp_path / "m", "--layout", "transformers")
    assert not (tmp_path / "m").exists()


# ---- the transformers class


def our_loss(model: HiggsAudioModel, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, text loss) of our code as the transformers class defines it: text mean + sum of the codebooks' means."""
    config = model.config
    batch = make_batch(config, tokenizer)
    model = model_patch.patch_for_training(model)
    sums = train.forward(model, batch, loss.LabelSpec.of(config))[0].losses
    objective = loss.Objective(text_weight=1.0, audio_weight=config.audio_num_codebooks)
    return objective(sums, sums.text.targets[0], sums.audio.targets), sums.text.nats[0] / sums.text.targets[0]


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def test_our_loss_is_the_native_loss_golden(tokenizer):
    """Loss and every parameter's gradient norm, as transformers computed them once (tests/make_golden.py)."""
    golden = load_file(GOLDEN)
    model = HiggsAudioModel(golden_config(tokenizer))
    model.load_state_dict({n.removeprefix("weight."): t.float() for n, t in golden.items() if n.startswith("weight.")})
    mine, text = our_loss(model, tokenizer)
    mine.backward()
    assert relative(mine, golden["loss"]) < 1e-6 and relative(text, golden["text_loss"]) < 1e-6  # measured 0
    gradients = {name: p.grad.norm() for name, p in model.named_parameters()}
    expected = {n.removeprefix("gradient."): t for n, t in golden.items() if n.startswith("gradient.")}
    assert gradients.keys() == expected.keys()
    worst = max(relative(gradients[name], expected[name]) for name in expected)
    assert worst < 2e-6, worst  # measured 1e-7
    with safe_open(GOLDEN, framework="pt") as file:
        assert file.metadata()["transformers"].startswith("5.")


@pytest.mark.native
@pytest.mark.skipif("NATIVE_PYTHON" not in os.environ, reason="NATIVE_PYTHON names no Python with transformers >= 5.18")
def test_the_native_class_loads_our_export(tokenizer, tmp_path):
    """Same logits, loss and gradients. Measured, relative to the largest value: logits 0, loss 1e-7, gradients 1.6e-7."""
    model = make_model(golden_config(tokenizer), seed=3)
    said, versions = ask_native(os.environ["NATIVE_PYTHON"], model, tokenizer, tmp_path)
    assert tuple(map(int, versions["transformers"].split(".")[:2])) >= (5, 18)
    batch = make_batch(model.config, tokenizer)
    with torch.no_grad():
        output = model(**batch.model_inputs())
    real = output.attention_mask.bool()
    spoken = output.expanded_input_ids == model.config.audio_out_token_idx
    assert relative(output.logits[real], said["text_logits"][real]) < 1e-6
    assert relative(output.audio_logits, said["audio_logits"][spoken]) < 1e-6
    mine, text = our_loss(model, tokenizer)
    mine.backward()
    assert relative(mine, said["loss"]) < 1e-6 and relative(text, said["text_loss"]) < 1e-6
    for name, parameter in model.named_parameters():
        theirs = said[f"gradient.{layouts.rename(name, 'transformers')}"]
        assert relative(parameter.grad.norm(), theirs) < 2e-6, name


@pytest.mark.native
@pytest.mark.skipif("NATIVE_PYTHON" not in os.environ, reason="NATIVE_PYTHON names no Python with transformers >= 5.18")
def test_we_load_what_the_native_class_saves(newer, boson, tmp_path):
    """save_pretrained of model and tokenizer there, read here: the same weights."""
    code = (
        "import sys; from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration as Model\n"
        "Model.from_pretrained(sys.argv[1], use_text_head=True).save_pretrained(sys.argv[2])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    subprocess.run([os.environ["NATIVE_PYTHON"], "-c", code, newer, tmp_path / "saved"], check=True, capture_output=True)
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    merge.convert(read.open_model(tmp_path / "saved"), tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(boson))


@pytest.mark.native
@pytest.mark.skipif("NATIVE_PYTHON" not in os.environ, reason="NATIVE_PYTHON names no Python with transformers >= 5.18")
def test_the_transformers_snippet_of_a_card_runs(newer, tmp_path):
    """The processor that we write finds tokenizer, codec and chat template; the model answers, and there is sound."""
    python = os.environ["NATIVE_PYTHON"]
    if subprocess.run([python, "-c", "import torchaudio"], capture_output=True, check=False).returncode:
        pytest.skip("NATIVE_PYTHON has no torchaudio, which transformers' codec needs")
    merge.convert(read.open_model(newer), tmp_path / "voice", "transformers")
    write_wav(tmp_path / "reference.wav", 0.4)
    done = subprocess.run(
        [python, ROOT / "tests" / "native_card.py", "voice"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert soundfile.info(tmp_path / "answer.wav").frames >= 960
