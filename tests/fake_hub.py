"""The Hugging Face Hub and an encoder, as small as download and check need them."""

import io
import json
from hashlib import sha256

import datasets
import huggingface_hub
import numpy
import requests
from huggingface_hub.utils._http import OfflineAdapter
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(requests.adapters.BaseAdapter):
    """Answers `datasets` and `huggingface_hub` in place of the Hub.

    status: of every answer; 0 for no connection. cut: the end of the path of a file that arrives incomplete.
    """

    def __init__(self):
        super().__init__()
        self.pages, self.sent, self.status, self.cut = {}, [], 200, "nothing"

    def publish(self, kind, name, files):
        """Adds a repository with one commit. kind: datasets or models. files: content by path."""
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        tree = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
        folders = {path.partition("/")[0] for path in files if "/" in path}
        tree += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders]
        for revision in (f"/revision/{COMMIT}", ""):
            self.pages[f"/api/{kind}/{name}{revision}"] = json.dumps(info).encode()
        for folder in folders:
            self.pages[f"/api/{kind}/{name}/tree/{COMMIT}/{folder}"] = json.dumps(tree).encode()
        prefix = "/datasets" if kind == "datasets" else ""
        self.pages |= {f"{prefix}/{name}/resolve/{COMMIT}/{path}": content for path, content in files.items()}

    def send(self, request, **options):
        if self.status == 0:
            raise requests.ConnectionError
        response, path = requests.Response(), request.path_url.partition("?")[0]
        body = self.pages.get(path, b"")
        response.request, response.url, response.status_code = request, request.url, self.status
        headers = {"X-Repo-Commit": COMMIT, "ETag": sha256(body).hexdigest(), "Content-Length": len(body)}
        if self.status == 200 and path not in self.pages:
            response.status_code = 404
            kind = "Entry" if "/resolve/" in path else "Repo" if "/nothing" in path else "Revision"
            headers["X-Error-Code"] = f"{kind}NotFound"
        response.headers.update(headers)
        self.sent += [path] * (request.method == "GET")
        response.raw = io.BytesIO(body[: -20 if path.endswith(self.cut) else None])
        return response


def connect(monkeypatch, hub=None):
    """Makes `hub` answer for the Hub; without it, the libraries are in offline mode."""
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", hub is None)
    session = requests.Session()
    session.mount("https://", hub or OfflineAdapter())
    huggingface_hub.configure_http_backend(lambda: session)


def write_encoder(folder):
    """Writes an encoder's folder whose tokenizer knows one word and whose weights are of no model."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file({"w": numpy.arange(6, dtype="float32")}, folder / "model.safetensors")
    return folder
