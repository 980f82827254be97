"""Feed damaged and random files to each reader of outside files: it reads them or refuses them in one sentence."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_hub import write_encoder
from scripts import download
from scripts.common import UserError
from scripts.convert import convert_split, make_doc
from scripts.panx import read_tsv

VOCAB = spacy.blank("it").vocab


def tsv(path):
    convert_split(read_tsv(path), str(path), partial(make_doc, VOCAB))


def encoder_folder(path):
    """An encoder's folder in which one file is the damaged one; its length chooses which."""
    folder, data = write_encoder(path.with_suffix(".folder")), path.read_bytes()
    files = sorted(folder.iterdir())
    files[len(data) % len(files)].write_bytes(data)
    download.check_encoder(folder, path.name)


def checksums(path):
    download.compare({split: {"sha256": "0", "sentences": 1} for split in download.SPLITS}, "PAN-X.it", path)


SUMS = b'{"PAN-X.it": {"train": {"sha256": "0", "sentences": 1}, "validation": {"sha256": "1", "sentences": 2}}}'
with tempfile.TemporaryDirectory() as folder:
    ENCODER = [path.read_bytes() for path in write_encoder(Path(folder)).iterdir()]
DEEP = b"[" * 100_000  # nested too deeply for a JSON reader
# valid files of each reader, to be damaged
READERS = {
    tsv: ["\ufeffAnna\tB-PER\nNeri\tI-PER\r\n\n \tO\n\nBari\u2028\tB-LOC\nè\tO\n".encode(), b"a\tI-ORG\n"],
    encoder_folder: [*ENCODER, (8).to_bytes(8, "little") + b'{"a":{} ' + b"0" * 8, DEEP],
    checksums: [SUMS, DEEP],
}


def damaged(whole):
    """Random bytes, or a valid file with up to six places overwritten, inserted or cut out."""

    def apply(data, changes):
        for share, noise, cut in changes:
            at = int(share * len(data))
            data = data[:at] + noise + data[at + cut :]
        return data

    noise = st.binary(max_size=8) | st.sampled_from([b"\t", b"\n", b"\0" * 4, b"\xff" * 8, b"\x80", b"I-PER", b"-1"])
    change = st.tuples(st.floats(0, 1), noise, st.integers(0, 8) | st.just(10**9))
    return st.binary(max_size=200) | st.builds(apply, st.sampled_from(whole), st.lists(change, max_size=6))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_a_sentence(tmp_path_factory, reader, data):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data.draw(damaged(READERS[reader])))
    try:
        reader(path)
    except UserError as error:
        assert path.name in str(error)
        assert "\n" not in str(error)
