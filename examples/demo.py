"""Run the workflow on the sample corpus, install the wheel in a venv and show what it finds in six texts.

`make demo` runs it. The output of pip and of the workflow's commands goes to build/demo.log.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import srsly

LOG = Path("build/demo.log")
VENV = Path("build/demo-venv")
EPOCHS = Path("metrics/training.jsonl")
# the sample has less than half of the model card's sentences: smaller batches make enough steps
VARIABLES = {"dataset": "corpus/sample", "dataset_config": "sample", "encoder": "assets/encoder-small", "gpu_id": "-1"}
VARIABLES |= {"train_size": "0", "dev_size": "0", "test_size": "0", "batch_size": "8", "epochs": "2"}
TEXTS = (
    "Maria Gaetana Agnesi nacque a Milano e insegnò matematica all'Università di Bologna.",
    "TRENI FERMI A GENOVA, TRENITALIA SI SCUSA CON I PENDOLARI DELLA LIGURIA",
    "ciao giulia, stasera arrivo a bologna verso le nove, avvisi tu marco?",
    "La Officine Bertolazzi S.r.l., con sede in Modena, qui rappresentata dalla dott.ssa Carla Righetti, si obbliga a "
    "consegnare la merce entro trenta giorni.",
    "Dopo il temporale l'aria era limpida e nessuno aveva voglia di rientrare.",
    "«Hai sentito Elena?» chiese Tommaso dalla porta. «È tornata ieri da Napoli, l'hanno assunta alla Olivetti.» "
    "«Allora resterà a Ivrea» disse la zia, «e tu non aspettarla.»",
)


def run(step: str, *command: str | Path) -> None:
    """Run a command, print each epoch's figures when it ends, and if the command fails, exit with the log's end."""
    with LOG.open("a", encoding="utf8") as log:
        print("$", *command, file=log, flush=True)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    started, epochs = time.time(), 0
    while process.poll() is None:
        time.sleep(0.2)
        # not the file of an earlier run
        if step == "train" and EPOCHS.exists() and EPOCHS.stat().st_mtime > started:
            epochs = print_epochs(epochs)
    if process.returncode:
        lines = LOG.read_text(encoding="utf8", errors="replace").splitlines()[-15:]
        sys.exit("\n".join((f"{step} failed; the last lines of {LOG}:", *lines)))
    if step == "train":
        print_epochs(epochs)


def print_epochs(shown: int) -> int:
    """Print the figures of all epochs but the first `shown`; return how many are shown now."""
    rows = list(srsly.read_jsonl(EPOCHS, skip=True))
    for row in rows[shown:]:
        losses = f"training loss {row['training_loss']:.4f}, validation loss {row['validation_loss']:.4f}"
        print(f"  epoch {row['epoch']:g}: {losses}, F1 {row['ents_f']:.2%}")
    return max(shown, len(rows))


def report(step: str, wheel: str) -> None:
    """Print what a step of the workflow has given."""
    if step == "convert":
        sample, encoder = srsly.read_json("corpus/stats.json")["train"], srsly.read_json("assets/encoder/config.json")
        size = f"{encoder['num_hidden_layers']} layers of width {encoder['hidden_size']}"
        print(f"  {sample['sentences']} sentences to train on, multilingual-e5-small with {size} as encoder")
    elif step == "evaluate":
        files = {"gold tokens": "test", "raw text": "raw_text", "running text": "running"}
        scores = {title: srsly.read_json(f"metrics/{name}.json")["ents_f"] for title, name in files.items()}
        print("  test F1:", ", ".join(f"{title} {score:.2%}" for title, score in scores.items()))
    elif step == "package":
        print(f"  {wheel}, {Path(wheel).stat().st_size / 1e6:.1f} MB")


def show(package: str) -> None:
    """Print the entities that an installed package finds in the texts."""
    import spacy  # slow to import, and only the wheel's venv needs it

    for doc in spacy.load(package).pipe(TEXTS):
        print(doc.text, *(f"  {ent.label_}  {ent.text}" for ent in doc.ents), sep="\n")


def main() -> None:
    """Run each step of the workflow, then install and use the wheel."""
    os.chdir(Path(__file__).resolve().parent.parent)
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("", encoding="utf8")
    project = srsly.read_yaml("project.yml")
    helps = {command["name"]: command["help"] for command in project["commands"]}
    name, version = "{lang}_{name}".format(**project["vars"]), project["vars"]["version"]
    wheel = f"packages/{name}-{version}/dist/{name}-{version}-py3-none-any.whl"
    variables = [word for key, value in VARIABLES.items() for word in (f"--vars.{key}", value)]
    for step in ("build-encoder", *project["workflows"]["all"]):
        print(f"{step}: {helps[step]}")
        # what `spacy project run` calls after importing spaCy
        run(step, sys.executable, "-m", "weasel", "run", step, ".", *variables)
        report(step, wheel)

    print(f"install: Install the wheel, and nothing else of this project, in {VENV}.")
    versions = Path("build/demo-versions.txt")  # those of this venv, which pip has in its cache
    # an installed wheel of this project is another one
    versions.write_bytes(subprocess.check_output([sys.executable, "-m", "pip", "freeze", "--exclude", name]))
    run("install", sys.executable, "-m", "venv", "--clear", VENV)
    run("install", VENV / "bin/python", "-m", "pip", "install", "--no-input", "-c", versions, wheel)
    print("The wheel's entities in six texts:")
    command = [VENV / "bin/python", __file__, name]
    sys.exit(subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}).returncode)


if __name__ == "__main__":
    show(sys.argv[1]) if sys.argv[1:] else main()
