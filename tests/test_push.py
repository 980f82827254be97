import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import srsly
import typer
import yaml
from typer.testing import CliRunner

from scripts import push as push_script

META = {
    "lang": "it",
    "name": "panx_xlmr",
    "version": "1.0.0",
    "license": "MIT",
    "performance": {"ents_p": 0.81, "ents_r": 0.83, "ents_f": 0.82},
}
WHEEL = b"PK" + b"\0" * 1000


@pytest.fixture
def package(tmp_path):
    """A folder as `spacy package` makes it."""
    folder = tmp_path / "it_panx_xlmr-1.0.0"
    model = folder / "it_panx_xlmr" / "it_panx_xlmr-1.0.0"
    model.mkdir(parents=True)
    (model / "config.cfg").touch()
    srsly.write_json(model / "meta.json", META)
    for name in ("README.md", "LICENSE", "LICENSES_SOURCES"):
        (model / name).write_text(f"# {name}", encoding="utf8")
    (folder / "dist").mkdir()
    (folder / "dist" / "it_panx_xlmr-1.0.0-py3-none-any.whl").write_bytes(WHEEL)
    return folder


class Hub(ThreadingHTTPServer):
    """A stub of the Hub's API for uploads; `status` is what it answers a commit with."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.repos, self.regular, self.large, self.commits = [], {}, {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        hub, body = self.server, self.body()
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.answer({"error": "Unauthorized"}, 401)
        elif self.path == "/api/repos/create":
            hub.repos.append(json.loads(body)["name"])
            self.answer({"url": f"{hub.address}/anna/it_panx_xlmr"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".whl") else "regular" for file in files]
            ways = [
                {"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)
            ]
            self.answer({"files": ways})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        o | {"actions": {"upload": {"href": f"{hub.address}/store/{o['oid']}"}}} for o in objects
                    ],
                }
            )
        elif self.path.endswith("/commit/main") and hub.status == 200:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.regular[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                hub.commits.append(line["key"])
            self.answer({"commitUrl": f"{hub.address}/anna/it_panx_xlmr/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": "no"}, hub.status if hub.status != 200 else 404)

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_GET(self):
        self.answer({"id": "anna/it_panx_xlmr", "sha": "0"})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def run(*arguments):
    app = typer.Typer()
    app.command()(push_script.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_by_default_nothing_is_uploaded_and_all_files_are_shown(package, hub):
    code, output = run(package, "anna/it_panx_xlmr")
    assert code == 0
    for name in ("it_panx_xlmr-1.0.0-py3-none-any.whl", "README.md", "meta.json", "LICENSE", "LICENSES_SOURCES"):
        assert name in output
    assert "would go to anna/it_panx_xlmr" in output
    assert hub.repos == hub.commits == []


def test_wheel_and_card_are_uploaded_in_one_commit(package, hub):
    code, output = run(package, "anna/it_panx_xlmr", "true")
    assert code == 0, output
    assert "/anna/it_panx_xlmr/commit/1" in output
    assert hub.large == {hashlib.sha256(WHEEL).hexdigest(): WHEEL}
    assert hub.commits.count("header") == 1
    assert set(hub.regular) == {"README.md", "meta.json", "LICENSE", "LICENSES_SOURCES"}
    header, card = hub.regular["README.md"].decode().removeprefix("---\n").split("---\n")
    assert card == "# README.md"
    described = yaml.safe_load(header)
    assert described["tags"] == ["spacy", "token-classification"]
    assert described["model-index"][0]["results"][0]["metrics"][2]["value"] == 0.82


@pytest.mark.parametrize(("status", "advice"), [(403, "token that may write"), (503, "try again later")])
def test_a_hub_that_refuses_is_one_sentence(package, hub, status, advice):
    hub.status = status
    code, output = run(package, "anna/it_panx_xlmr", "true")
    assert code == 1
    assert f"HTTP {status}" in output
    assert advice in output
    assert hub.regular == {}


def test_a_hub_that_is_away_is_one_sentence(package, hub):
    hub.shutdown()
    hub.server_close()
    code, output = run(package, "anna/it_panx_xlmr", "true")
    assert code == 1
    assert "can't be reached" in output


@pytest.mark.parametrize("repo", ["", "a/b/c", "anna/con spazi"])
def test_a_name_that_no_repository_has_is_one_sentence(package, hub, repo):
    code, output = run(package, repo, "true")
    assert code == 1
    assert "--vars.hub_repo" in output


def test_without_a_wheel_nothing_is_uploaded(package, hub):
    next((package / "dist").iterdir()).unlink()
    code, output = run(package, "anna/it_panx_xlmr", "true")
    assert code == 1
    assert "spacy project run all" in output
    assert hub.repos == []
