"""Uploading to a Hub that stands on this machine: the real client, what arrives, and what goes wrong."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub.utils import reset_sessions

from export.__main__ import main


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs. `server.kept`: {path: content}; large files arrive apart from the commit."""

    def log_message(self, *_):
        pass

    def answer(self, value: dict, status: int = 200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.answer({"id": "anna/voice", "private": self.server.is_private, "siblings": []})

    def do_PUT(self):
        self.server.large[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.created = json.loads(content)
            self.answer({"url": f"{self.server.url}/anna/voice"}, 200)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(content)["files"]]
            files = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            self.answer({"files": files})
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(content)["objects"]
            put = {o["oid"]: {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}} for o in objects}
            self.answer({"transfer": "basic", "objects": [o | {"actions": put[o["oid"]]} for o in objects]})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.kept[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/anna/voice/commit/1"})


@pytest.fixture()
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.is_private = f"http://127.0.0.1:{server.server_port}", False
    server.kept, server.large, server.tokens = {}, {}, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    reset_sessions()  # another test may have been offline
    yield server
    server.shutdown()


def test_an_export_is_pushed(hub, checkpoint_dir, tmp_path, capsys):
    """What is public and how large is said first; every file of OUT arrives, nothing else, by the user's token."""
    (tmp_path / "beside.txt").write_text("not ours")
    assert main(["export", str(checkpoint_dir), str(tmp_path / "out"), "--push", "anna/voice"]) == 0
    out = capsys.readouterr().out
    sent = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert hub.kept == sent and len(sent) > 5 and hub.tokens == {"Bearer hf_secret"} and not hub.created.get("private")
    size = sum(map(len, sent.values())) / 1e9
    assert f"{hub.url}/anna/voice will show everyone {len(sent)} files, {size:.3g} GB: README.md, config.json" in out
    assert out.endswith(f"pushed: {hub.url}/anna/voice\n") and "hf_secret" not in out
    assert b'"anna/voice", codec' in sent["README.md"], "the card's snippets load the pushed model"


def test_what_stops_a_push(hub, checkpoint_dir, tmp_path, monkeypatch, capsys):
    """Before anything is written: a name, a token. After it: the network, and a repository that is public already."""

    def error(*extra: str) -> str:
        assert main(["export", str(checkpoint_dir), str(tmp_path / "out"), *extra]) == 2
        return capsys.readouterr().err

    assert "--push voice: expected OWNER/NAME" in error("--push", "voice")
    assert "--private: nothing is uploaded without --push" in error("--private")
    with monkeypatch.context() as patched:
        patched.delenv("HF_TOKEN")
        patched.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "--push anna/voice: no token; make one that may write" in error("--push", "anna/voice")
    assert not (tmp_path / "out").exists()
    assert "this repository is public already" in error("--push", "anna/voice", "--private") and not hub.kept
    assert f"{tmp_path / 'out'} exists already" in error("--push", "anna/voice")
    hub.is_private = True
    assert main(["export", str(checkpoint_dir), str(tmp_path / "private"), "--push", "anna/voice", "--private"]) == 0
    assert hub.created["private"] and "those who may read this private repository" in capsys.readouterr().out
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["export", str(checkpoint_dir), str(tmp_path / "off"), "--push", "anna/voice"]) == 2
    err = capsys.readouterr().err
    assert "http://127.0.0.1:9 did not take it: " in err and f"try again: hf upload anna/voice {tmp_path / 'off'}" in err
