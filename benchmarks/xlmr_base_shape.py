"""Prove that xlm-roberta-base's shape works, without its weights: run the project with a random encoder of that shape.

    python -m benchmarks.xlmr_base_shape

Run the workflow on the sample corpus with two training steps on the CPU, install the wheel in a new venv and load it
there. Print the time and peak memory of each command and the wheel's size. The tokenizer is that of
assets/encoder-small (`spacy project run build-encoder`), which has XLM-R's 250,002 wordpieces. Needs about 12 GB of
disk and memory.
"""

import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

import srsly
import torch
from wasabi import msg

from benchmarks.accuracy import ROOT, copy_project, run

SETTINGS = {
    "gpu_id": -1,
    "dataset": "corpus/sample",
    "dataset_config": "sample",
    "train_size": 48,
    "dev_size": 24,
    "test_size": 0,
    "epochs": 1,
    # Nearly untrained, the head finds some entities by chance; `package` refuses a pipeline that finds none.
    "learning_rate": 1e-9,
}


def build_encoder(folder: Path) -> None:
    """Write a randomly initialized encoder of xlm-roberta-base's shape to the new folder `folder`."""
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

    AutoTokenizer.from_pretrained(ROOT / "assets" / "encoder-small").save_pretrained(folder)
    # the values in FacebookAI/xlm-roberta-base's config.json
    config = XLMRobertaConfig(
        vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1
    )
    XLMRobertaModel(config).save_pretrained(folder)


def main() -> None:
    """Run every step and print the table."""
    rows: list[tuple[str, str, str]] = []

    def measure(name: str, command: list[object], cwd: Path) -> None:
        seconds, memory = run(command, Path(temporary) / "log.txt", cwd, torch.get_num_threads())
        rows.append((name, f"{seconds:.0f} s", f"{memory:.1f} GB"))

    with tempfile.TemporaryDirectory() as temporary:
        project, venv = Path(temporary) / "project", Path(temporary) / "venv"
        encoder = Path(temporary) / "xlm-r-base-shape"
        copy_project(project)
        # In another process: a command's peak memory includes that of this process when it starts the command.
        builder = multiprocessing.get_context("spawn").Process(target=build_encoder, args=(encoder,))
        builder.start()
        builder.join()
        if builder.exitcode:
            msg.fail("The encoder could not be built; its error is above.", exits=1)
        size = sum(path.stat().st_size for path in encoder.iterdir()) / 1e6
        settings = [f"--vars.{key}={value}" for key, value in (SETTINGS | {"encoder": encoder}).items()]
        for step in srsly.read_yaml(project / "project.yml")["workflows"]["all"]:
            measure(step, [sys.executable, "-m", "spacy", "project", "run", step, ".", *settings], project)
        (wheel,) = (project / "packages").rglob("*.whl")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        python = venv / "bin" / "python"
        pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "requirements.txt"]
        measure("install with dependencies", [*pip, wheel], venv)
        code = "import spacy; print(spacy.load('it_panx_xlmr')('Andrea vive a Bari.').ents)"
        measure("load and run", [python, "-c", code], venv)
        msg.table(rows, header=("step", "time", "peak memory"), divider=True)
        print(f"encoder {size:.0f} MB, wheel {wheel.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
