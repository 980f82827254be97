"""Uploads the package to the Hugging Face Hub: the wheel, the model card, meta.json."""

from pathlib import Path
from typing import Annotated, Any

import srsly
import typer
import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from wasabi import msg

from scripts.common import UserError, one_sentence


def front_matter(meta: dict[str, Any]) -> str:
    """The model card's YAML header by which the Hub finds a spaCy package and shows its figures."""
    name = f"{meta['lang']}_{meta['name']}"
    performance = meta["performance"]
    metrics = [
        {"name": f"NER {title}", "type": kind, "value": round(performance[key], 4)}
        for title, kind, key in (
            ("Precision", "precision", "ents_p"),
            ("Recall", "recall", "ents_r"),
            ("F Score", "f_score", "ents_f"),
        )
    ]
    header = {
        "tags": ["spacy", "token-classification"],
        "language": [meta["lang"]],
        "license": meta["license"].lower(),
        "library_name": "spacy",
        "model-index": [
            {
                "name": name,
                "results": [{"task": {"name": "NER", "type": "token-classification"}, "metrics": metrics}],
            }
        ],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"


def files_to_upload(package: Path) -> dict[str, bytes | Path]:
    """What goes to the Hub, by its name there, of a folder that `spacy package --build wheel` has made.

    The wheel keeps its version: pip no longer installs the nameless `any` that spaCy's packages have there. Raises
    UserError where the package is not whole.
    """
    folders = [path.parent for path in package.glob("*/*/config.cfg")]
    wheels = list((package / "dist").glob("*.whl"))
    if len(folders) != 1 or len(wheels) != 1:
        raise UserError(f"{package}: no package with one wheel; run `spacy project run all` first.")
    (folder,), (wheel,) = folders, wheels
    meta = srsly.read_json(folder / "meta.json")
    card = front_matter(meta) + (folder / "README.md").read_text(encoding="utf8")
    return {
        wheel.name: wheel,
        "README.md": card.encode("utf8"),
        "meta.json": folder / "meta.json",
        "LICENSE": folder / "LICENSE",
        "LICENSES_SOURCES": folder / "LICENSES_SOURCES",
    }


def upload(files: dict[str, bytes | Path], repo: str, message: str) -> str:
    """Uploads the files in one commit, to a repository that is made if it is not there; returns the commit's address.

    Raises UserError for a name that no repository can have, without a token, and where the Hub refuses or is away.
    """
    api = HfApi()
    try:
        validate_repo_id(repo)
        api.create_repo(repo, exist_ok=True)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        return api.create_commit(repo, operations, commit_message=message).commit_url
    except HFValidationError:
        raise UserError(f"{repo!r} is no name of a repository; set --vars.hub_repo to OWNER/NAME.") from None
    except LocalTokenNotFoundError:
        raise UserError("No token for the Hub is there; run `huggingface-cli login` first.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = "run `huggingface-cli login` with a token that may write" if status in (401, 403) else "try again later"
        raise UserError(f"The Hub refused {repo} (HTTP {status}), and nothing is published; {hint}.") from None
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(f"The Hub can't be reached ({type(error).__name__}); try again with a connection.") from None


def main(
    package: Annotated[Path, typer.Argument(help="Folder that `spacy package` has made", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: OWNER/NAME", show_default=False)],
    publish: Annotated[bool, typer.Argument(help="false: only show what would be uploaded")] = False,
) -> None:
    """Upload the package's wheel and model card to the Hub."""
    with one_sentence():
        files = files_to_upload(package)
        for name, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            msg.info(f"{name}: {size / 1e6:,.2f} MB")
        if not publish:
            msg.good(f"This would go to {repo}; --vars.publish true uploads it.")
            return
        version = srsly.read_json(files["meta.json"])["version"]
        msg.good(f"Published: {upload(files, repo, f'Version {version}')}")


if __name__ == "__main__":
    typer.run(main)
