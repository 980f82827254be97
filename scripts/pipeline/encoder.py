"""The transformer layer `panx_xlmr.TransformerModel.v2`.

It computes what `spacy-transformers.TransformerModel.v3` computes, at less cost, and feeds the same listeners:

- It lowercases lines and sentences in capitals, and puts a space between a sign and the word after it (tokenizer.py),
  since the encoder saw most words in lower case and after a space.
- It tokenizes a Doc's text as a whole, in linear time, and cuts it into windows of wordpieces. Every wordpiece gets its
  vector from the window with most context around it. Every token has a vector: one without a wordpiece (white space, a
  zero-width character) gets that of the special token at the start.
- Windows of similar length run together, on a CPU with the faster of two matrix kernels (linear.py).
- In training only the embeddings that a batch reads have a gradient, not the whole table.
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import srsly
import torch
from safetensors.torch import load, save
from spacy import registry
from spacy.tokens import Doc
from spacy.training import minibatch_by_padded_size
from spacy_transformers.data_classes import FullTransformerBatch, HFObjects, TransformerData, WordpieceBatch
from spacy_transformers.layers import trfs2arrays
from spacy_transformers.layers.hf_shim import HFShim
from spacy_transformers.layers.transformer_model import TransformerModel, huggingface_from_pretrained
from thinc.api import Model, Optimizer, chain, get_array_module, get_torch_default_device, torch2xp, xp2torch
from thinc.types import Floats2d, Floats3d, Ragged
from torch.nn.functional import embedding
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import no_init_weights

# Wordpieces per window without the special tokens, and how many of them the next window repeats.
WINDOW, OVERLAP = 126, 32
# Padded wordpieces per group of windows that run together. Small groups waste least padding on a CPU.
GROUP_SIZE = {"cpu": 256, "cuda": 16384}
Precision = Literal["float32", "bfloat16", "int8"]

if hasattr(os, "register_at_fork"):  # nlp.pipe(n_process=…) forks
    # a forked tokenizer warns without the variable, and a forked PyTorch waits forever for its parent's threads
    os.register_at_fork(before=lambda: os.environ.setdefault("TOKENIZERS_PARALLELISM", "false"))
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass
class Window:
    """Consecutive wordpieces of one text: `ids`, special tokens included.

    It yields `count` vectors: those of its pieces from `first` on, for the batch's rows from `row` on.
    """

    ids: list[int]
    row: int
    first: int
    count: int

    def __len__(self) -> int:
        return len(self.ids)


class VectorBatch(FullTransformerBatch):
    """The vectors of a batch of Docs: one row per wordpiece, text after text, a special token before each text."""

    def __init__(self, doc_data: list[TransformerData], vectors: torch.Tensor) -> None:
        nothing, output = TransformerData.empty(), BaseModelOutput(last_hidden_state=vectors)
        super().__init__([], nothing.wordpieces, output, nothing.align, cached_doc_data=doc_data)

    def unsplit_by_doc(self, arrays: list[list[Floats3d]]) -> "VectorBatch":
        """Concatenate the Docs' gradients, each of shape (1, wordpieces, width), to shape (wordpieces, width)."""
        xp = get_array_module(arrays[0][0])
        return VectorBatch([], xp2torch(xp.concatenate([gradient[0] for (gradient,) in arrays])))


def prepare_transformer(transformer: torch.nn.Module) -> torch.nn.Module:
    """Give the transformer the faster linear layers and drop its pooler, whose output nobody reads."""
    transformer.pooler = None
    registry.misc.get("panx_xlmr.FasterLinear.v1")(transformer)  # scripts/pipeline/linear.py
    return transformer


class TransformerShim(HFShim):
    """Hold the transformer and its tokenizer, and run windows of wordpieces through the transformer."""

    def __init__(self, *args: Any, precision: Precision, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.precision = precision
        self.low_precision: torch.nn.Module | None = None  # the transformer's copy for prediction in lower precision
        # rows of the embedding table that were read since the last update, as leaves of the graph
        self.embedding_rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_bytes(self) -> bytes:
        """Serialize the tokenizer's files, the config and the weights (safetensors, losslessly in 8, 16 or 32 bits)."""
        # a copy without the weights, which HFShim would pickle; other threads may predict meanwhile
        light = copy.copy(self)
        light._model = torch.nn.Module()
        message = srsly.msgpack_loads(super(TransformerShim, light).to_bytes())
        if message["config"]:
            # the folder it was loaded from: the same pipeline must be the same bytes
            message["config"].pop("_name_or_path", None)
            message["state"] = save(registry.misc.get("panx_xlmr.ShortestWeights.v1")(self._model.state_dict()))
        return srsly.msgpack_dumps(message)

    def from_bytes(self, bytes_data: bytes) -> "TransformerShim":
        """Load what `to_bytes` returned, with weights as float32. Code in the files is never run.

        Raises ValueError for a tokenizer file that would be outside its folder, or a tokenizer config that names files.
        """
        message = srsly.msgpack_loads(bytes_data)
        if not message["config"]:
            return super().from_bytes(bytes_data)
        del bytes_data  # frees a copy of the weights, if the caller keeps none
        files = message["tokenizer"]
        files.pop("kwargs", None)
        if wrong := [name for name in files if name in ("", "..") or Path(name).name != name]:
            raise ValueError(f"The pipeline's tokenizer has a file {wrong[0]!r}, expected plain names; do not use it.")
        # json, because srsly writes a layer_norm_eps of 1e-12 as 0, and refuses model_max_length = 10**30
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        if named := [n for n in ("vocab_file", "tokenizer_file", "merges_file", "spm_file") if settings.get(n)]:
            raise ValueError(f"The pipeline's tokenizer_config.json names a file ({named[0]}); do not use it.")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(message["config"]), encoding="utf8")
            for file, content in files.items():
                (folder / file).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            vocab_file = getattr(tokenizer, "vocab_file", None)
            vocab_file_contents = Path(vocab_file).read_bytes() if vocab_file else None
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with no_init_weights():
                # AutoModel.from_config would import the config of every model that transformers has
                transformer = MODEL_MAPPING[type(config)](config)
        # assigned: no second copy of the weights
        weights = registry.misc.get("panx_xlmr.FullWeights.v1")(load(message.pop("state")))
        prepare_transformer(transformer).load_state_dict(weights, assign=True)
        self._model, self.low_precision = transformer.to(get_torch_default_device()).eval(), None
        prepare_tokenizer(tokenizer)
        self._hfmodel = HFObjects(tokenizer, transformer, vocab_file_contents)
        # made now, not in the first of several threads that predict
        if self._prediction_model() is transformer and self.precision == "bfloat16":
            warning = "This processor is not faster in bfloat16 than in float32: the pipeline predicts in float32."
            warnings.warn(warning, stacklevel=2)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle stores: all but the copy for prediction, which is made again."""
        return self.__dict__ | {"low_precision": None}

    def predict(self, windows: Sequence[Window]) -> torch.Tensor:
        """Return the vectors of the windows' pieces, shape (rows, width), without dropout."""
        if self._model.training:
            self._model.eval()
        with torch.inference_mode():
            return self._run(windows, self._model.get_input_embeddings(), self._prediction_model())

    def begin_update(self, windows: Sequence[Window]) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        """Return the vectors, with dropout, and a function that accumulates gradients from the vectors' gradient."""
        transformer = self._model
        transformer.train()
        weight = transformer.get_input_embeddings().weight
        ids = numpy.unique([i for window in windows for i in window.ids])  # on the CPU: `unique` would wait for a GPU
        rows = torch.from_numpy(ids).to(weight.device)
        leaf = weight.detach()[rows].requires_grad_(weight.requires_grad)
        with torch.autocast("cuda", enabled=self._mixed_precision):
            vectors = self._run(windows, lambda ids: embedding(torch.searchsorted(rows, ids), leaf), transformer)

        def backprop(gradient: torch.Tensor) -> None:
            # scaled, so that half precision does not underflow; `finish_update` unscales
            torch.autograd.backward(vectors, self._grad_scaler.scale(gradient, inplace=True))
            self.embedding_rows.append((rows, leaf))

        return vectors, backprop

    def finish_update(self, optimizer: Optimizer) -> None:
        """Update the parameters, in one call of `update_encoder` if the optimizer has it, as the project's does."""
        self.low_precision = None
        embeddings = self._model.get_input_embeddings()
        read = [(rows, leaf.grad) for rows, leaf in self.embedding_rows if leaf.grad is not None]
        self.embedding_rows = []
        parameters = [(name, p) for name, p in self._model.named_parameters() if p.grad is not None]
        self._grad_scaler.unscale([*(p.grad for _, p in parameters), *(gradient for _, gradient in read)])
        if hasattr(optimizer, "update_encoder"):
            if parameters and not self._grad_scaler.found_inf:
                optimizer.update_encoder(self.id, parameters, embeddings.weight, read)
            self._model.zero_grad()
            self._grad_scaler.update()
            return
        if read:
            embeddings.weight.grad = torch.zeros_like(embeddings.weight)
            for rows, gradient in read:
                embeddings.weight.grad.index_add_(0, rows, gradient)
        super().finish_update(optimizer)
        embeddings.weight.grad = None

    def _prediction_model(self) -> torch.nn.Module:
        """Return the transformer in the requested precision; the embedding table is not copied."""
        device = self._model.device
        if self.precision == "float32" or (self.precision == "bfloat16" and not _has_bfloat16(device)):
            return self._model
        if self.low_precision is None:
            table = self._model.get_input_embeddings()
            others = {id(table): torch.nn.Identity()}  # what the copy has in their place
            if self.precision == "int8":
                if device.type != "cpu":
                    raise ValueError(f"Precision int8 is for the CPU, but the pipeline is on {device}; use bfloat16.")
                encode = self._hfmodel.tokenizer.backend_tokenizer.encode
                int8_layers = registry.misc.get("panx_xlmr.Int8Layers.v2")  # scripts/pipeline/linear.py
                others |= int8_layers(self._model, lambda text: table(torch.tensor([encode(text).ids])))
            # assigned when complete, since other threads may predict meanwhile
            low_precision = copy.deepcopy(self._model, others).eval()
            self.low_precision = low_precision.to(torch.bfloat16) if self.precision == "bfloat16" else low_precision
        return self.low_precision

    def _run(
        self, windows: Sequence[Window], embed: Callable[[torch.Tensor], torch.Tensor], transformer: torch.nn.Module
    ) -> torch.Tensor:
        device, dtype = transformer.device, transformer.dtype
        size, by_length = GROUP_SIZE.get(device.type, GROUP_SIZE["cuda"]), sorted(windows, key=len)
        # spaCy groups them from the longest to the shortest
        groups = [*minibatch_by_padded_size(by_length, size, buffer=len(windows))][::-1]
        arrays = []
        for group in groups:
            length = len(group[-1])
            ids, mask = numpy.zeros((2, len(group), length), dtype="int64")
            places, rows = [], []  # where a vector is in the group's output, and its row
            for i, window in enumerate(group):
                ids[i, : len(window)] = window.ids
                mask[i, : len(window)] = 1
                places.append(numpy.arange(window.count) + i * length + window.first)
                rows.append(numpy.arange(window.count) + window.row)
            arrays += [ids, mask, numpy.concatenate(places), numpy.concatenate(rows)]
        # one copy to a GPU is faster than several
        flat = torch.from_numpy(numpy.concatenate([array.ravel() for array in arrays])).to(device)
        parts = flat.split([array.size for array in arrays])
        tensors = iter([part.view(array.shape) for part, array in zip(parts, arrays, strict=True)])
        vectors = torch.empty(sum(window.count for window in windows), transformer.config.hidden_size, device=device)
        for group, ids, mask, places, rows in zip(groups, tensors, tensors, tensors, tensors, strict=True):
            # PyTorch is faster without a mask
            masked = {"attention_mask": mask} if len(group[0]) < len(group[-1]) else {}
            output = transformer(inputs_embeds=embed(ids).to(dtype), **masked).last_hidden_state
            # group by group: the vectors of a long text are in memory once
            vectors.index_copy_(0, rows, output.flatten(0, 1).index_select(0, places).float())
        return vectors


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "cpu" or registry.misc.get("panx_xlmr.HasBFloat16.v1")()  # scripts/pipeline/linear.py


@registry.architectures("panx_xlmr.TransformerModel.v2")
class PanxTransformerModel(TransformerModel):
    """The thinc layer from Docs to a VectorBatch; `tokenizer` and `transformer` are Hugging Face's objects."""

    def __init__(
        self,
        name: str,
        tokenizer_config: dict[str, Any],
        transformer_config: dict[str, Any],
        mixed_precision: bool,
        precision: Precision = "float32",
    ) -> None:
        """Load a Hugging Face transformer with a fast tokenizer.

        The first four arguments are those of `spacy-transformers.TransformerModel.v3`. precision: the precision of
        matrix products in prediction; bfloat16 and int8 (CPU only) are faster and not exact. Weights are trained and
        stored in float32.
        """
        super().__init__(name, None, tokenizer_config, transformer_config)
        self.layers[0].shims[0] = TransformerShim(
            self.layers[0].shims[0]._hfmodel,
            precision=precision,
            mixed_precision=mixed_precision,
            grad_scaler_config={},  # a new dict, because spacy-transformers writes into it
        )
        del self.attrs["get_spans"]  # windows are cut from wordpieces, not from Docs
        self.attrs["replace_listener_cfg"] = _own_encoder_config
        self._func = forward
        self.init = _initialize

    def from_bytes(self, bytes_data: bytes) -> "PanxTransformerModel":
        """Load what `to_bytes` returned. Unlike thinc's, it keeps no second and third copy of the weights meanwhile."""
        message = srsly.msgpack_loads(bytes_data)
        del bytes_data
        stored = [shims.pop() for shims in message["shims"] if shims]
        self.from_dict(message)
        self.layers[0].shims[0].from_bytes(stored.pop())
        return self

    def copy(self) -> "PanxTransformerModel":
        """Return a copy that shares no weights."""
        return copy.deepcopy(self)


@registry.architectures("panx_xlmr.Tok2VecTransformer.v3")
def tok2vec_transformer(
    name: str,
    tokenizer_config: dict[str, Any],
    transformer_config: dict[str, Any],
    mixed_precision: bool,
    pooling: Model[Ragged, Floats2d] | None = None,
    grad_factor: float = 1.0,
    precision: Precision = "float32",
) -> Model[list[Doc], list[Floats2d]]:
    """Build the transformer inside another pipe, as `nlp.replace_listeners` does with a listener.

    pooling, grad_factor: the arguments of spacy-transformers' listener; ours has none.
    """
    model = PanxTransformerModel(name, tokenizer_config, transformer_config, mixed_precision, precision)
    first_wordpieces = registry.layers.get("panx_xlmr.FirstWordpieces.v1")  # scripts/pipeline/pipes.py
    # nested, as `replace_listeners` puts it in the listener's place
    own = model.attrs["replace_listener"](model)
    return chain(own, trfs2arrays(pooling, grad_factor) if pooling else first_wordpieces())


def _own_encoder_config(encoder_config: dict[str, Any], listener_config: dict[str, Any]) -> dict[str, Any]:
    of_listener = {key: listener_config[key] for key in ("pooling", "grad_factor") if key in listener_config}
    return encoder_config | of_listener | {"@architectures": "panx_xlmr.Tok2VecTransformer.v3"}


def _initialize(model: PanxTransformerModel, X: Any = None, Y: Any = None) -> None:
    if not model.attrs["has_transformer"]:
        config = (model._init_tokenizer_config, model._init_transformer_config)
        objects = huggingface_from_pretrained(model.attrs["name"], *config)
        prepare_transformer(objects.transformer)
        prepare_tokenizer(objects.tokenizer)
        model.attrs["set_transformer"](model, objects)


def forward(
    model: PanxTransformerModel, docs: list[Doc], is_train: bool
) -> tuple[VectorBatch, Callable[[VectorBatch], list[Doc]]]:
    """Return the vectors of the Docs' wordpieces, and the function that backpropagates their gradient."""
    windows, doc_data = wordpiece_windows(model.tokenizer, docs)
    vectors, backprop = model.layers[0].shims[0](windows, is_train)
    array, row = torch2xp(vectors.detach()), 0
    for data in doc_data:
        if rows := sum(data.wordpieces.lengths):
            data.model_output = BaseModelOutput(last_hidden_state=array[None, row : row + rows])
            row += rows

    def backprop_docs(gradient: VectorBatch) -> list[Doc]:
        backprop(gradient.model_output.last_hidden_state)
        return docs

    return VectorBatch(doc_data, vectors), backprop_docs


def wordpiece_windows(
    tokenizer: PreTrainedTokenizerFast, docs: Sequence[Doc]
) -> tuple[list[Window], list[TransformerData]]:
    """Return the windows of all Docs, and each Doc's wordpieces and their alignment with its tokens."""
    if tokenizer.backend_tokenizer.truncation or tokenizer.backend_tokenizer.padding:
        prepare_tokenizer(tokenizer)  # again, since somebody called the tokenizer with other settings
    before, after = special_ids(tokenizer)
    encoder_text = registry.misc.get("panx_xlmr.EncoderText.v1")  # scripts/pipeline/tokenizer.py
    texts = [encoder_text(doc) for doc in docs]
    encodings = tokenizer.backend_tokenizer.encode_batch([text for text, _ in texts], add_special_tokens=False)
    windows, doc_data, row = [], [TransformerData.empty() for _ in docs], 0
    for doc, data, encoding, (_, places) in zip(docs, doc_data, encodings, texts, strict=True):
        if not len(doc):
            continue
        ids = encoding.ids
        for start, end, first, last in window_bounds(len(ids)):
            if start == 0:
                first -= 1  # the text's first row belongs to the special token before its first wordpiece
            read = [*before, *ids[start:end], *after]
            windows.append(Window(read, row=row + 1 + first, first=len(before) + first - start, count=last - first))
        data.wordpieces = WordpieceBatch(
            strings=[[tokenizer.convert_ids_to_tokens(before[-1]), *encoding.tokens]],
            input_ids=numpy.array([[before[-1], *ids]], dtype="i"),
            attention_mask=numpy.ones((1, len(ids) + 1), dtype="f"),
            lengths=[len(ids) + 1],
            token_type_ids=None,
        )
        offsets = numpy.array([(-1, -1), *encoding.offsets], dtype="int64")  # the special token is before the text
        data.align = align_tokens(doc, offsets - numpy.searchsorted(places, offsets))
        row += len(ids) + 1
    return windows, doc_data


def prepare_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Turn off truncation and padding, once: while other threads tokenize, changing them raises "Already borrowed".

    Raises ValueError for a tokenizer that does not return its wordpieces' offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: its wordpieces cannot be aligned with tokens; "
            "use an encoder with a tokenizer.json, or install the package that converts its tokenizer."
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens before and after a text. Raises ValueError if there is none before it."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    pieces = [i for i, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
    if not pieces or not pieces[0]:
        name = type(tokenizer).__name__
        raise ValueError(f"{name} puts no special token before a text; use an encoder that needs one.")
    return encoding.ids[: pieces[0]], encoding.ids[pieces[-1] + 1 :]


def window_bounds(length: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield windows over `length` wordpieces: (start, end, first, last).

    The window holds the wordpieces from `start` to `end` and yields the vectors from `first` to `last`: each half of an
    overlap belongs to the window with more context around it.
    """
    for start in range(0, max(length - OVERLAP, 1), WINDOW - OVERLAP):
        end = min(start + WINDOW, length)
        yield start, end, start + (OVERLAP // 2 if start else 0), end - (OVERLAP // 2 if end < length else 0)


def align_tokens(doc: Doc, offsets: numpy.ndarray) -> Ragged:
    """Return the rows of each token's wordpieces, or row 0, the special token's, if a token has none.

    offsets: the first character of each row's wordpiece and the one after its last, shape (rows, 2). The space before a
    word belongs to its wordpiece; a wordpiece of such a space alone is skipped.
    """
    starts, ends = offsets.T
    token_starts = numpy.array([token.idx for token in doc], dtype="int64")
    token_ends = token_starts + numpy.array([len(token) for token in doc], dtype="int64")
    first = numpy.searchsorted(starts, token_starts, side="right") - 1
    first += ends[first] <= token_starts
    lengths = numpy.searchsorted(starts, token_ends, side="left") - first
    rows = numpy.where(lengths > 0, first, 0)
    lengths = numpy.maximum(lengths, 1)
    # a token's rows are consecutive: count up from its first one
    step = numpy.arange(lengths.sum()) - numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
    return Ragged((numpy.repeat(rows, lengths) + step).astype("i"), lengths.astype("i"))
