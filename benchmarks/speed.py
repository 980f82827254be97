"""Compare the pipeline's speed with that of its alternatives: same weights, texts and threads, in one run.

    python -m benchmarks.speed training/model --test corpus/test.spacy

The systems are the pipeline in each precision; `transformers.pipeline` with its best batch size; stock
spacy-transformers with spaCy's `ner`; and with --package any installed spaCy pipeline. Each runs in a separate process,
and they take turns: the table gives the median of the rounds, the minimum and the maximum. All but a package have the
encoder weights of the pipeline. `transformers.pipeline` also has its linear layer, without the CRF, and labels each
word by its first wordpiece. The `ner` has random weights, which cost the same as trained ones. F1 of both is left out.

The first line names the processor and its instructions. On a processor with AVX-512 all is measured a second time with
PyTorch and oneDNN limited to AVX2, as on most desktops.

The last table compares ways to use several cores: threads, `nlp.pipe(n_process=2)` and two processes of their own. With
--data and --encoder, training is compared with the card's recipe (benchmarks/recipe.py). --plot draws how the cost
grows with the length of a text and with the size of a batch.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy
import spacy
import srsly
import torch
import typer
from spacy.language import Language
from spacy.tokens import DocBin
from thinc.api import xp2torch
from wasabi import msg

from scripts.evaluate import score_entities
from scripts.pipeline import linear

ROOT = Path(__file__).resolve().parent.parent

OURS = {f"this pipeline, {precision}": precision for precision in ("float32", "bfloat16", "int8")}
EXACT = "this pipeline, float32"
PLAIN = "this pipeline, PyTorch's own linear layers"
HUGGING_FACE = "transformers.pipeline"
STOCK = "spacy-transformers + ner"
# threads of a process, n_process of `nlp.pipe`, and processes of their own that share the texts
WAYS = {"one thread": (1, 1, 1), "two threads": (2, 1, 1), "n_process=2": (1, 2, 1), "two processes": (1, 1, 2)}
BATCH_SIZES = (1, 8, 16, 32, 64, 128)
LENGTHS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
# limits the kernels of a child process to AVX2
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
STOCK_CONFIG = {
    "@architectures": "spacy-transformers.TransformerModel.v3",
    "get_spans": {"@span_getters": "spacy-transformers.strided_spans.v1", "window": 128, "stride": 96},
    "tokenizer_config": {"use_fast": True},
}
Entities = list[tuple[int, int, str]]
Annotate = Callable[[Sequence[str]], Iterator[Entities]]


def entities(nlp: Language, n_process: int = 1) -> Annotate:
    """Return the function that streams texts through a pipeline, or calls it with a single text."""

    def annotate(texts: Sequence[str]) -> Iterator[Entities]:
        for doc in nlp.pipe(texts, n_process=n_process) if len(texts) > 1 else map(nlp, texts):
            yield [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]

    return annotate


def save_hugging_face(nlp: Language, folder: Path) -> None:
    """Save the pipeline's encoder and linear layer as a model for token classification, and its tokenizer."""
    from transformers import AutoModelForTokenClassification

    ner, objects = nlp.get_pipe("ner"), nlp.get_pipe("transformer").model.layers[0].shims[0]._hfmodel
    tags = dict(enumerate(ner.tags))
    config = objects.transformer.config
    config.id2label, config.label2id = tags, {tag: number for number, tag in tags.items()}
    model = AutoModelForTokenClassification.from_config(config)
    getattr(model, model.base_model_prefix).load_state_dict(objects.transformer.state_dict())
    output = ner.model.get_ref("output_layer")
    for name, parameter in (("W", model.classifier.weight), ("b", model.classifier.bias)):
        parameter.data.copy_(xp2torch(output.get_param(name)))
    model.save_pretrained(folder)
    objects.tokenizer.save_pretrained(folder)
    if objects.vocab_file_contents is not None:  # spacy-transformers reads it too
        (folder / objects.tokenizer.vocab_files_names["vocab_file"]).write_bytes(objects.vocab_file_contents)


def hugging_face(folder: Path, batch_size: int, gpu_id: int) -> Annotate:
    """Return the function that runs `transformers.pipeline` with the model in the folder."""
    from transformers import pipeline

    # with a stride a long text is split into windows; without one it is truncated
    settings = {"aggregation_strategy": "first", "batch_size": batch_size, "device": gpu_id, "stride": 32}
    classify = pipeline("token-classification", str(folder), **settings)

    def annotate(texts: Sequence[str]) -> Iterator[Entities]:
        for text, found in zip(texts, classify(list(texts)), strict=True):
            # an entity's first wordpiece includes the space before it
            spaces = [len(text[e["start"] : e["end"]]) - len(text[e["start"] : e["end"]].lstrip()) for e in found]
            yield [
                (int(ent["start"]) + skip, int(ent["end"]), ent["entity_group"])
                for ent, skip in zip(found, spaces, strict=True)
            ]

    return annotate


def stock(nlp: Language, folder: Path) -> Annotate:
    """Return the function that runs spaCy's `ner` on stock spacy-transformers with the encoder in the folder."""
    blank = spacy.blank(nlp.lang)
    blank.add_pipe("transformer", config={"model": STOCK_CONFIG | {"name": str(folder)}})
    listener = {"@architectures": "spacy-transformers.TransformerListener.v1", "grad_factor": 1.0}
    listener["pooling"] = {"@layers": "reduce_mean.v1"}
    parser = {"@architectures": "spacy.TransitionBasedParser.v2", "state_type": "ner", "extra_state_tokens": False}
    parser |= {"hidden_width": 64, "maxout_pieces": 2, "use_upper": False, "tok2vec": listener}
    ner = blank.add_pipe("ner", config={"model": parser})
    for label in nlp.get_pipe("ner").labels:
        ner.add_label(label)
    blank.initialize()

    def annotate(texts: Sequence[str]) -> Iterator[Entities]:
        for doc in blank.pipe(texts) if len(texts) > 1 else map(blank, texts):
            doc._.trf_data = None
            yield [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]

    return annotate


def make(name: str, model: Path, folder: Path, gpu_id: int) -> Annotate:
    """Return the function of a system. folder: written by `save_hugging_face`. gpu_id: -1 for the CPU."""
    if gpu_id >= 0:
        spacy.require_gpu(gpu_id)
    if name.startswith(HUGGING_FACE):
        return hugging_face(folder, int(name.split()[-1]), gpu_id)
    if name.startswith("package "):
        return entities(spacy.load(name.removeprefix("package ")))
    precision = OURS.get(name, "float32")
    nlp = spacy.load(model, config={"components.transformer.model.precision": precision})
    if name == STOCK:
        return stock(nlp, folder)
    if name == PLAIN:
        for module in nlp.get_pipe("transformer").model.transformer.modules():
            if type(module) is linear.OneDnnLinear:
                module.__class__ = module.__class__.__base__
    _, n_process, _ = WAYS.get(name, (1, 1, 1))
    return entities(nlp, n_process)


def work(name: str, model: Path, folder: Path, gpu_id: int) -> None:
    """Answer requests from standard input, one line of JSON each: the loop of a system's process."""
    annotate = make(name, model, folder, gpu_id)
    for line in sys.stdin:
        request = json.loads(line)
        texts, answer = request["texts"], {}
        start = time.perf_counter()
        if request["single"]:
            seconds = []
            for text in texts:
                before = time.perf_counter()
                list(annotate([text]))
                seconds.append(time.perf_counter() - before)
            answer["percentiles"] = [float(p) for p in numpy.percentile(seconds, [50, 95])]
        else:
            found = list(annotate(texts))
            answer["entities"] = found if request["entities"] else None
        answer["seconds"] = time.perf_counter() - start
        # getrusage would include the parent's memory before exec
        status = Path("/proc/self/status").read_text()
        answer["memory"] = int(next(row.split()[1] for row in status.splitlines() if row.startswith("VmHWM"))) / 1e6
        if gpu_id >= 0:
            answer["memory"] = torch.cuda.max_memory_reserved() / 1e9
        print("\n" + json.dumps(answer), flush=True)


def processor() -> str:
    """Return the processor's name and the instructions that decide about the speed of matrix products."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    bfloat16 = "faster" if linear.has_bfloat16() else "no faster"
    vnni = "with" if torch.cpu._is_vnni_supported() else "without"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {bfloat16} in bfloat16, {vnni} VNNI"


class System:
    """A system in a separate process."""

    def __init__(self, name: str, model: Path, folder: Path, threads: int, gpu_id: int = -1) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.speed", str(model), "--work", name, "--folder", str(folder)]
        command += ["--gpu-id", str(gpu_id)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def ask(self, texts: Sequence[str], single: bool = False, entities: bool = False) -> dict[str, Any]:
        """Return the answer of `work`. Raises RuntimeError if the process has ended."""
        request = {"texts": list(texts), "single": single, "entities": entities}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        except (BrokenPipeError, StopIteration):
            raise RuntimeError(f"{self.name} has ended; run it with --work '{self.name}' to see why") from None

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def read_test(path: Path) -> tuple[list[str], list[Entities]]:
    """Return the texts of a .spacy file and their gold entities."""
    docs = list(DocBin().from_disk(path).get_docs(spacy.blank("xx").vocab))
    return [doc.text for doc in docs], [[(e.start_char, e.end_char, e.label_) for e in doc.ents] for doc in docs]


def f1(gold: Sequence[Entities], found: Sequence[Sequence[Any]]) -> float:
    """Return strict F1 by characters, in percent."""
    as_sets = ([{tuple(entity) for entity in some} for some in texts] for texts in (gold, found))
    return 100 * score_entities(*as_sets)["ents_f"]


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Return median, minimum and maximum."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def compare(
    names: Sequence[str],
    model: Path,
    folder: Path,
    texts: Sequence[str],
    gold: Sequence[Entities],
    count: int,
    rounds: int,
    threads: int,
    gpu_id: int = -1,
) -> None:
    """Print the table of all systems: speed on the first `count` texts, F1 on all of them."""
    timed = texts[:count]
    words = sum(len(text.split()) for text in timed)
    singles = timed[:200]
    systems = {}
    for name in names:  # one at a time: loading takes the most memory
        systems[name] = System(name, model, folder, threads, gpu_id)
        systems[name].ask(timed[:64])
    speeds: dict[str, list[float]] = {name: [] for name in names}
    latencies: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, system in systems.items():
            speeds[name].append(words / system.ask(timed)["seconds"])
        for name, system in systems.items():
            latencies[name].append(system.ask(singles, single=True)["percentiles"])
    rows, found, best = [], {}, {}
    hugging_face_name = max((n for n in names if n.startswith(HUGGING_FACE)), key=lambda n: max(speeds[n]))
    for name in names:
        everything = texts if name in OURS or name.startswith("package ") else timed
        answer = systems[name].ask(everything, entities=True)
        systems[name].close()
        found[name], best[name] = answer["entities"], statistics.median(speeds[name])
        p50, p95 = (statistics.median(latency[i] for latency in latencies[name]) * 1000 for i in (0, 1))
        ratio = best[name] / statistics.median(speeds[hugging_face_name])
        changed = sum(a != b for a, b in zip(found[EXACT], found[name], strict=False))
        score = f"{f1(gold, found[name]):.2f}" if len(found[name]) == len(gold) else ""
        differ = "" if name == STOCK or name.startswith("package ") else str(changed)
        figures = [spread(speeds[name]), f"{ratio:.2f}", f"{p50:.1f}", f"{p95:.1f}", f"{answer['memory']:.2f}"]
        differ += f" of {len(found[name])}" if differ else ""
        rows.append([name, *figures, score, differ])
    header = ("system", "words/s", "ratio", "p50 ms", "p95 ms", "GB", "F1", "texts that differ")
    print(markdown(header, rows))
    print(
        f"\n{threads} thread(s), {len(timed)} texts of {words} words, {rounds} rounds; ratio to {hugging_face_name}; "
    )
    print(f"F1 from raw text on {len(texts)} texts; latency of one text at a time; differ from {EXACT}.", flush=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def best_batch_size(model: Path, folder: Path, texts: Sequence[str], threads: int, gpu_id: int = -1) -> str:
    """Return the name of `transformers.pipeline` with the batch size that is fastest on the texts."""
    seconds = {}
    for size in BATCH_SIZES:
        system = System(f"{HUGGING_FACE}, batches of {size}", model, folder, threads, gpu_id)
        system.ask(texts[:64])
        seconds[system.name] = system.ask(texts)["seconds"]
        system.close()
    return min(seconds, key=seconds.get)


def compare_ways(model: Path, folder: Path, texts: Sequence[str], rounds: int) -> None:
    """Print words/s of the pipeline with one and two cores."""
    words = sum(len(text.split()) for text in texts)
    systems = {
        name: [System(name, model, folder, threads) for _ in range(processes)]
        for name, (threads, _, processes) in WAYS.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    with ThreadPoolExecutor() as pool:
        for turn in range(rounds + 1):
            for name, some in systems.items():
                start = time.perf_counter()
                list(pool.map(System.ask, some, [texts[i :: len(some)] for i in range(len(some))]))
                if turn:  # the first one warms up
                    speeds[name].append(words / (time.perf_counter() - start))
    rows = []
    for name, some in systems.items():
        ratio = statistics.median(speeds[name]) / statistics.median(speeds["one thread"])
        rows.append([name, spread(speeds[name]), f"{ratio:.2f}"])
        for system in some:
            system.close()
    print("\n" + markdown((f"{os.cpu_count()} cores", "words/s", "ratio"), rows), flush=True)


def plot(names: Sequence[str], model: Path, folder: Path, texts: Sequence[str], threads: int, path: Path) -> None:
    """Plot words/s against the words of a text, and against the number of texts."""
    figure, (by_length, by_batch) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    running = " ".join(texts).split()
    words = (running * (max(LENGTHS) // len(running) + 1))[: max(LENGTHS)]
    for name in names:
        system = System(name, model, folder, threads)
        system.ask(texts[:64])
        speeds = []
        for length in LENGTHS:
            text = " ".join(words[:length])
            speeds.append(length / min(system.ask([text])["seconds"] for _ in range(3 if length < 3_000 else 1)))
        by_length.plot(LENGTHS, speeds, marker="o", label=name)
        sizes = [2**n for n in range(11) if 2**n <= len(texts)]
        speeds = [
            sum(len(t.split()) for t in texts[:size]) / min(system.ask(texts[:size])["seconds"] for _ in range(3))
            for size in sizes
        ]
        by_batch.plot(sizes, speeds, marker="o", label=name)
        system.close()
    for axes, label in ((by_length, "words of one text"), (by_batch, "texts in a call")):
        axes.set(xscale="log", xlabel=label, ylabel="words/s", ylim=0)
        axes.grid(alpha=0.3)
    by_length.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    msg.good(str(path))


def compare_training(
    data: Path, encoder: Path, rounds: int, threads: int, sentences: int = 480, gpu_id: int = -1
) -> None:
    """Print sentences/s and peak memory of the card's recipe and this project.

    The time is that of three epochs less that of one epoch, so that it includes validation but not the start.
    """
    from benchmarks import accuracy

    sizes = {"train": sentences, "validation": 24, "test": 24}
    seconds: dict[str, list[float]] = {accuracy.BASELINE: [], accuracy.PROJECT: []}
    memory = dict.fromkeys(seconds, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        accuracy.prepare(folder / "project", data, encoder, sizes, gpu_id)
        steps = sentences // srsly.read_yaml(ROOT / "project.yml")["vars"]["batch_size"]
        for _ in range(rounds):
            measured: dict[tuple[str, int], float] = {}
            for epochs in (1, 3):
                recipe = accuracy.recipe_command(data, encoder, gpu_id, {"epochs": epochs} | sizes)
                overrides = {"training.max_steps": epochs * steps, "training.eval_frequency": steps}
                train = accuracy.train_command(folder / "trained", gpu_id, overrides)
                jobs = ((accuracy.BASELINE, recipe, ROOT), (accuracy.PROJECT, train, folder / "project"))
                for system, command, cwd in jobs:
                    measured[system, epochs], peak = accuracy.run(command, folder / "log.txt", cwd, threads)
                    memory[system] = max(memory[system], peak)
            for system in seconds:
                seconds[system].append(2 * sentences / (measured[system, 3] - measured[system, 1]))
    rows = [[system, spread(values, ".1f"), f"{memory[system]:.2f}"] for system, values in seconds.items()]
    print("\n" + markdown(("training", "sentences/s", "GB"), rows))


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline", show_default=False)],
    test: Annotated[Path, typer.Option(help="Test sentences (.spacy)")] = ROOT / "corpus" / "test.spacy",
    count: Annotated[int, typer.Option(help="Texts to time")] = 1500,
    rounds: Annotated[int, typer.Option(help="Rounds of timing")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of each system")] = 1,
    package: Annotated[list[str], typer.Option(help="Installed spaCy pipelines to compare")] = [],  # noqa: B006
    data: Annotated[Path | None, typer.Option(help="Folder of PAN-X.it as TSV files, for training")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Folder of the encoder, for training")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="PNG file of the plot")] = None,
    work_as: Annotated[str, typer.Option("--work", hidden=True)] = "",
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
    gpu_id: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Compare the pipeline's speed, memory and F1 with those of other systems."""
    if work_as:
        return work(work_as, model, folder, gpu_id)
    if (data is None) != (encoder is None):
        raise typer.BadParameter("Give --data and --encoder together.")
    print(f"Processor: {processor()}", flush=True)
    texts, gold = read_test(test)
    with tempfile.TemporaryDirectory() as name:
        save_hugging_face(spacy.load(model), Path(name))
        batched = best_batch_size(model, Path(name), texts[:count], threads)
        names = [*OURS, PLAIN, batched, STOCK, *(f"package {p}" for p in package)]
        compare(names, model, Path(name), texts, gold, count, rounds, threads)
        compare_ways(model, Path(name), texts[: 5 * count], rounds)
        if plot_file:
            plot([EXACT, "this pipeline, int8", batched], model, Path(name), texts[:count], threads, plot_file)
    if data and encoder:
        compare_training(data, encoder, 3, threads)
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        command = [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]]
        subprocess.run(command, env=os.environ | AVX2_ONLY, check=True)


if __name__ == "__main__":
    typer.run(main)
