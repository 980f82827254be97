"""Feed damaged and random files to each reader of outside files: it reads them or refuses them in one sentence.

`make test` makes 100 files for each reader; `make fuzz` runs for ten minutes and counts.
"""

import contextlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
import spacy
import typer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from spacy.tokens import DocBin

from fake_hub import write_encoder
from scripts import download
from scripts.common import UserError
from scripts.configure import count_docs
from scripts.convert import convert_split, make_doc
from scripts.panx import read_tsv

Reader = Callable[[Path, bytes], None]
VOCAB = spacy.blank("it").vocab


def refused(error: UserError, name: str) -> None:
    """Assert that a refusal is a sentence with the file's name, and raise it."""
    assert name in str(error)
    assert "\n" not in str(error)
    raise error


def tsv(path: Path, data: bytes) -> None:
    """Read a split's file and convert it to Docs."""
    path.write_bytes(data)
    try:
        convert_split(read_tsv(path), str(path), partial(make_doc, VOCAB))
    except UserError as error:
        refused(error, path.name)


def encoder_folder(path: Path, data: bytes) -> None:
    """Check an encoder's folder in which one file has these bytes; their number chooses the file."""
    folder = path.with_suffix(".folder")
    if not folder.exists():
        write_encoder(folder)
    files = sorted(folder.iterdir())
    damaged = files[len(data) % len(files)]
    whole = damaged.read_bytes()
    damaged.write_bytes(data)
    try:
        download.check_encoder(folder, "damaged")
    except UserError as error:
        refused(error, "damaged")
    finally:
        damaged.write_bytes(whole)


def checksums(path: Path, data: bytes) -> None:
    """Compare with configs/checksums.json."""
    path.write_bytes(data)
    found = {split: {"sha256": "0", "sentences": 1} for split in download.SPLITS}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            download.compare(found, "PAN-X.it", path)
    except UserError as error:
        refused(error, path.name)


def docbin(path: Path, data: bytes) -> None:
    """Count the Docs of a corpus file."""
    path.write_bytes(data)
    try:
        count_docs(path)
    except UserError as error:
        refused(error, path.name)


SUMS = b'{"PAN-X.it": {"train": {"sha256": "0", "sentences": 1}, "validation": {"sha256": "1", "sentences": 2}}}'
with tempfile.TemporaryDirectory() as folder:
    ENCODER = [path.read_bytes() for path in write_encoder(Path(folder)).iterdir()]
DEEP = b"[" * 100_000  # nested too deeply for a JSON reader
# valid files of each reader, to be damaged
READERS: dict[Reader, list[bytes]] = {
    tsv: ["\ufeffAnna\tB-PER\nNeri\tI-PER\r\n\n \tO\n\nBari\u2028\tB-LOC\nè\tO\n".encode(), b"a\tI-ORG\n"],
    encoder_folder: [*ENCODER, (8).to_bytes(8, "little") + b'{"a":{} ' + b"0" * 8, DEEP],
    checksums: [SUMS, DEEP],
    docbin: [DocBin(docs=[spacy.blank("it")("Bari")]).to_bytes()],
}


def damaged(whole: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return random bytes, or a valid file with up to six places overwritten, inserted or cut out."""

    def apply(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
        for share, noise, cut in changes:
            at = int(share * len(data))
            data = data[:at] + noise + data[at + cut :]
        return data

    noise = st.binary(max_size=8) | st.sampled_from([b"\t", b"\n", b"\0" * 4, b"\xff" * 8, b"\x80", b"I-PER", b"-1"])
    change = st.tuples(st.floats(0, 1), noise, st.integers(0, 8) | st.just(10**9))
    return st.binary(max_size=200) | st.builds(apply, st.sampled_from(whole), st.lists(change, max_size=6))


def fuzz(reader: Reader, seconds: float = 0) -> Counter[str]:
    """Count the files that the reader has read and refused, 100 or more. Raises the first undocumented error."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:

        @settings(max_examples=100, deadline=None, database=None, phases=[Phase.generate, Phase.shrink])
        @given(damaged(READERS[reader]))
        def one(data: bytes) -> None:
            try:
                reader(Path(folder) / "damaged.file", data)
                counts["read"] += 1
            except UserError:
                counts["refused"] += 1

        one()
        while time.monotonic() < end:
            one()
    return counts


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(reader):
    assert fuzz(reader)["refused"]


def main(minutes: Annotated[float, typer.Option(help="For all readers together")] = 10) -> None:
    """Feed damaged files to each reader; print how many were read and refused."""
    for reader in READERS:
        counts = fuzz(reader, minutes * 60 / len(READERS))
        print(f"{reader.__name__}: {counts['read']:,} read, {counts['refused']:,} refused", flush=True)


if __name__ == "__main__":
    typer.run(main)
