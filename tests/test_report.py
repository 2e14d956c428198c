"""The page about a run: whole, self-contained, true to the files it is made of, and safe to open."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_codec import write_wav
from test_train import run_here, settings

from common import DataError
from generate.files import read_results
from generate.pictures import figure
from tools import report, verdicts

VOID = {"meta", "img", "circle", "polyline", "line", "br"}


class Page(HTMLParser):
    """Tags in order, texts, and that every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run_dir(toys, tmp_path_factory) -> Path:
    """A real run, whose last samples have sounds (any sounds: the codec has tests of its own) and a text of markup."""
    folder = tmp_path_factory.mktemp("report") / "run <1>"
    extra = {"val_manifest": toys / "val.jsonl", "val_steps": 1, "sample_steps": 1, "num_samples": 2, "audio_tokenizer": "none"}
    extra["mixed_precision"] = "no"
    run_here(settings(toys, folder, max_steps=3, **extra))
    last = folder / "samples" / "step_3"
    results = read_results(last)
    results[0] |= {"wav": "0.wav", "target_wav": "../prompts/0.target.wav", "text": "<script>alert('&')</script>"}
    write_wav(last / "0.wav", 0.2)
    write_wav(folder / "samples" / "prompts" / "0.target.wav", 0.3)
    (last / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    return folder


def test_the_page_holds_the_run(run_dir, toys):
    assert report.main([str(run_dir)]) == 0
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    shown = " ".join(page.texts)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    val, train = ([line for line in lines if line["split"] == split][-1] for split in ("val", "train"))
    for value in (val["loss"], train["loss"], val["audio_loss"], train["tokens_per_sec"]):
        assert report.show(value) in shown
    assert f"{val['audio_accuracy']:.1%}" in shown
    heads = [page.texts[page.texts.index(text)] for text in ("Listen", "What the figures say", "Curves", "Settings", "Data")]
    assert heads == sorted(heads, key=page.texts.index), "samples come first, then what the figures say"
    titles = [chart.get("aria-label") for chart in page.all("svg")]
    assert {"Loss (nats)", "Audio loss by codebook, validation", "Samples that end by themselves", "Learning rate"} <= set(
        titles
    )
    assert "Word error rate of samples" not in titles, "a figure that was never measured has no chart"
    assert shown.index("step 0, the base") < shown.index("step 1 ") < shown.index("step 3 ")
    assert any(text.endswith("/run <1>") for text in page.texts)
    assert "val.jsonl" in shown and "32" in shown and str(toys / "checkpoint") in shown
    changed, _, rest = text.partition("<details>")
    assert "<td>max_steps</td><td>3</td>" in changed and "<td>grad_clip</td><td>1.0</td>" in rest and "max_steps" not in rest


def test_samples_are_inside_the_page(run_dir):
    page = Page(report.page(report.read_run(run_dir)))
    sounds = [base64.b64decode(tag["src"].removeprefix("data:audio/wav;base64,")) for tag in page.all("audio")]
    files = [run_dir / "samples" / name for name in ("prompts/0.target.wav", "step_3/0.wav")]
    assert sounds == [path.read_bytes() for path in files]
    pictures = [base64.b64decode(tag["src"].removeprefix("data:image/png;base64,")) for tag in page.all("img")]
    assert len(pictures) == 4 * 2
    newest = read_results(run_dir / "samples" / "step_3")[0]
    assert np.array_equal(Image.open(io.BytesIO(pictures[3])), figure(run_dir / "samples" / "step_3", newest))


def test_nothing_comes_from_elsewhere(run_dir):
    """No script, nothing loaded from anywhere; what a record says is text, not markup."""
    text = report.page(report.read_run(run_dir))
    page = Page(text)
    assert not page.all("script") and not page.all("link") and "@import" not in text
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert references and all(value.startswith(("data:", "#")) for value in references)
    assert "<script>alert('&')</script>" in page.texts


def test_other_samples_and_a_choice_of_samplings(run_dir, tmp_path):
    """What generate wrote into samples/ gets cards of its own; of many samplings the first and last are shown."""
    assert report.choose(range(10), 4) == [0, 3, 6, 9] and report.choose([7], 4) == [7] and report.choose([], 4) == []
    said = tmp_path / "samples" / "final"
    said.mkdir(parents=True)
    np.save(said / "hello.npy", np.zeros((8, 0), np.int16))
    result = {"name": "hello", "text": "hello", "source": "l", "frames": 0, "stopped": False, "codes": "hello.npy"}
    (said / "results.jsonl").write_text(json.dumps(result) + "\n")
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text((run_dir / name).read_text() + ('{"split": "tra' if name == "metrics.jsonl" else ""))
    page = Page(report.page(report.read_run(tmp_path)))
    assert "nothing was generated" in page.texts and not page.all("img")
    assert len(report.page(report.read_run(run_dir), max_shown=1)) < len(report.page(report.read_run(run_dir)))
    assert "1 of 4 samplings are shown." in report.page(report.read_run(run_dir), max_shown=1)


def test_mistakes(run_dir, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "not the output folder of a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"split": "train", "step": 1}\nbroken\n{"split": "train", "step": 2}\n')
    assert report.main([str(tmp_path)]) == 2
    assert "metrics.jsonl line 2: not an object" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    said = tmp_path / "samples" / "x"
    said.mkdir(parents=True)
    np.save(tmp_path.parent / "secret.npy", np.zeros((8, 2), np.int16))
    result = {"name": "n", "text": "t", "frames": 2, "stopped": True, "codes": "../../../secret.npy"}
    (said / "results.jsonl").write_text(json.dumps(result) + "\n")
    assert report.main([str(tmp_path)]) == 2
    assert "a sample's file outside" in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot be read"):
        report.read_inside(report.Run(tmp_path, {}, {}, []), tmp_path / "gone.wav")


def test_curves():
    """Points stand where their values say; long curves are thinned to their means."""
    svg = report.chart("t", [report.Curve("a", [0, 10], [0.0, 1.0]), report.Curve("b", [5], [0.5])], "share")
    line = re.search(r'points="([^"]+)"', svg)[1]
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.split())
    assert (x0, x1) == (report.LEFT, report.WIDTH - report.RIGHT)
    assert (y0, y1) == (report.HEIGHT - report.BOTTOM, report.TOP)
    assert (
        re.search(r'cx="([\d.]+)"', svg)[1] == f"{(x0 + x1) / 2:.1f}"
        and re.search(r'cy="([\d.]+)"', svg)[1] == f"{(y0 + y1) / 2:.1f}"
    )
    assert report.chart("t", [report.Curve("a", [], [])]) == ""
    assert "log scale" in report.chart("t", [report.Curve("a", [1, 2], [1e-4, 1.0])], "loss")
    assert "log scale" in report.chart("t", [report.Curve("a", [1, 2, 3], [1e-4, 0.0, 1.0])], "loss")
    assert "log scale" not in report.chart("t", [report.Curve("a", [1, 2, 3], [0.0, 0.5, 1.0])], "loss")
    thin = report._thin(range(4000), [float(i % 2) for i in range(4000)])
    assert len(thin) == report.MAX_POINTS and {value for _, value in thin} == {0.5}
    assert report._round_numbers(0, 10) == [0, 2, 4, 6, 8, 10] and report._round_numbers(0.13, 0.21) == [0.14, 0.16, 0.18, 0.2]
    assert report._round_numbers(0.02, 3, is_log=True) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    assert [report.show(v) for v in (3, 0.12345, 12345.6, 2.7e-5, 0.0)] == ["3", "0.123", "12,346", "2.7e-5", "0"]


def test_a_validation_loss_in_words():
    def said(*values: float) -> tuple[str, str]:
        (found,) = verdicts.loss_trend([10 * (i + 1) for i in range(len(values))], values)
        return found.kind, found.text

    assert said(3.0, 2.0, 2.5) == ("bad", "rising since step 20 (2): overfitting; that step is the better model")
    assert said(3.0, 2.0, 1.5) == ("good", "still falling: training longer may help")
    assert said(3.0, 2.0, 1.999)[1].startswith("no longer falling") and said(3.0)[0] == "fair"
    assert verdicts.loss_trend([], []) == []


def test_figures_in_words():
    """The last value counts, what was not measured is not judged, and samples that contradict the loss are named."""
    val = [{"step": step, "loss": loss, "eos_accuracy": 0.3, "copy_share": 0.6} for step, loss in ((10, 2.0), (20, 1.0))]
    sample = [
        {"step": step, "stop_rate": rate, "duration_ratio": 1.1, "word_error_rate": None}
        for step, rate in ((10, 1.0), (20, 0.5))
    ]
    found = {
        verdict.title: verdict
        for verdict in verdicts.find({"val": val, "sample": sample, "train": [{"step": 20, "bad_steps": 2}]})
    }
    kinds = {title: verdict.kind for title, verdict in found.items()}
    assert kinds == {
        "validation loss": "good",
        "samples that end by themselves": "fair",
        "ends of clips predicted": "bad",
        "copy share": "bad",
        "length of samples against their targets": "good",
        "samples against the loss": "bad",
        "steps skipped": "fair",
    }
    assert (
        found["samples that end by themselves"].value == "50.0 %"
        and "prepare check --trim" in found["samples that end by themselves"].text
    )
    assert "stop_rate 1.000 to 0.500" in found["samples against the loss"].text
    assert verdicts.find({}) == []
