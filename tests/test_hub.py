"""Repositories of the Hub, by the real client and a server on this machine: fetched, or the reason and the remedy."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions

from common import CheckpointError, ConfigError, DataError
from config import BASE_CKPT, BASE_NAMES, BASE_REVISION
from export import pretrained
from generate.judges import Transcriber
from prepare import hub
from prepare.audio import download_codec
from prepare.packed import from_hub

SHA = "c" * 40
ANSWERS = {  # repository -> status and headers of every answer
    "owner/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "owner/none": (404, {"X-Error-Code": "RepoNotFound"}),
    "owner/old": (404, {"X-Error-Code": "RevisionNotFound"}),
    "owner/secret": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "owner/busy": (503, {}),
}


class Handler(BaseHTTPRequestHandler):
    """The few answers of the Hub that the client needs; `server.folders` holds the repositories that are there."""

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[:2])
        folder = self.server.folders.get(name)
        if folder is None:
            status, headers = ANSWERS.get(name, ANSWERS["owner/none"])
            return self.answer(status, headers)
        sha = BASE_REVISION if name in BASE_NAMES else SHA
        if is_api:
            files = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(folder.iterdir())]
            return self.answer(200, {}, json.dumps({"id": name, "sha": sha, "siblings": files}).encode())
        content = (folder / parts[-1]).read_bytes()
        return self.answer(200, {"X-Repo-Commit": sha, "ETag": f'"{parts[-1]}"'}, content)

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict, content: bytes = b"") -> None:
        self.server.asked.append(self.path)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture()
def server(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folders, server.asked = {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    reset_sessions()  # another test may have been offline
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("asked", BASE_NAMES)
@pytest.mark.parametrize("there", BASE_NAMES)
def test_the_base_has_two_names(asked, there, server, toys, capsys):
    """Whichever of them the Hub has; its size is said once, then it is on this machine, and found without the Hub."""
    server.folders[there] = toys / "checkpoint"
    folder = pretrained.find_base(asked, None)
    assert folder.name == BASE_REVISION and pretrained.read_base_config(folder).audio_num_codebooks == 8
    said = capsys.readouterr().err
    assert f"fetching {there}: 0.0" in said and f" GB from {constants.ENDPOINT} into {constants.HF_HUB_CACHE} (HF_HOME" in said
    assert pretrained.find_base(asked, None) == folder and "fetching" not in capsys.readouterr().err
    server.folders.clear()
    assert pretrained.find_base(asked, None) == folder


@pytest.mark.parametrize("name", [*ANSWERS, "not a name", "offline", "no network", "no room"])
def test_why_a_repository_cannot_be_had(name, server, tmp_path, monkeypatch):
    expected = {
        "owner/gated": r"the repository is gated; accept its terms on http://127.0.0.1:\d+/owner/gated, then HF_TOKEN=, or `hf auth login`",
        "owner/none": r"no such repository on http://127.0.0.1:\d+; check the name \(a private one needs HF_TOKEN=",
        "owner/old": "the repository has no revision v9",
        "owner/secret": r"the Hub refuses the token of HF_TOKEN \(status 401\)",
        "owner/busy": "the Hub answers with status 503; try again later",
        "not a name": r"neither a folder nor a repository \(OWNER/NAME\)",
        "offline": "HF_HUB_OFFLINE is set and .*/cache holds no copy; unset it, or name another cache with HF_HOME=",
        "no network": r"no connection to http://127.0.0.1:9, and .*/cache holds no copy; HF_ENDPOINT= names a mirror, HF_HOME= a folder",
        "no room": "0.0 GB to fetch, but 0.0 GB free in .*/cache; make room, or name a folder on another disk with HF_HOME=",
    }[name]  # fmt: skip
    if name == "owner/secret":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    if name == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if name == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    if name == "no room":
        server.folders["owner/name"] = tmp_path / "repository"
        (tmp_path / "repository").mkdir()
        (tmp_path / "repository" / "config.json").write_text("{}")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    asked = name if "/" in name or name == "not a name" else "owner/name"
    with pytest.raises(hub.HubError, match=f"^{asked}: {expected}") as caught:
        hub.fetch(asked, "v9" if name == "owner/old" else None)
    assert "\n" not in str(caught.value)


def test_every_kind_of_repository_says_so(server):
    """Base, codec, recogniser and dataset, by the commands' own functions."""
    with pytest.raises(
        CheckpointError, match=r"^checkpoint owner/gated .*: not a folder here; owner/gated: the repository is gated"
    ):
        pretrained.find_base("owner/gated", None)
    with pytest.raises(DataError, match=r"^--audio_tokenizer: no folder owner/gated; owner/gated: the repository is gated"):
        download_codec("owner/gated")
    with pytest.raises(ConfigError, match=r"^--asr_model owner/gated: cannot be loaded: owner/gated: the repository is gated"):
        Transcriber("owner/gated", "cpu")
    with pytest.raises(DataError, match=r"no file or folder owner/gated here; .* is gated; .*/datasets/owner/gated"):
        from_hub("owner/gated")
    assert BASE_CKPT in BASE_NAMES
