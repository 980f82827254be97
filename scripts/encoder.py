"""The transformer layer `panx_xlmr.TransformerModel.v1`: what spacy-transformers' own computes, at less cost.

It fits into spacy-transformers' `transformer` pipe and feeds its listeners. It differs from
`spacy-transformers.TransformerModel.v3` in this:

- A Doc's text is tokenized as a whole, in time linear in its length, and cut into windows of wordpieces, not of tokens.
  Every wordpiece gets its vector from the window in which it has most context, and every token has a vector: one
  without a wordpiece (white space, a zero-width character) takes that of the text's first special token.
- Windows of like length run together, so that little is spent on padding.
- In training only the embeddings that a batch reads have a gradient, not the whole table.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import srsly
import torch
from safetensors.torch import load, save
from spacy import registry
from spacy.tokens import Doc, Span
from spacy.util import SimpleFrozenDict
from spacy_transformers.data_classes import FullTransformerBatch, HFObjects, TransformerData, WordpieceBatch
from spacy_transformers.layers import trfs2arrays
from spacy_transformers.layers.hf_shim import HFShim
from spacy_transformers.layers.transformer_model import TransformerModel, huggingface_from_pretrained
from thinc.api import Model, Optimizer, chain, get_array_module, get_torch_default_device, torch2xp, xp2torch
from thinc.types import Floats2d, Floats3d, Ragged
from torch.nn.functional import embedding
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import no_init_weights

# Wordpieces in a window without the special tokens, and how many of them the next window repeats.
WINDOW, OVERLAP = 126, 32
# Wordpieces, padding included, that run together. On a CPU small groups of like length waste least; a GPU wants much
# work at a time.
GROUP_SIZE = {"cpu": 256, "cuda": 16384}


@dataclass
class Window:
    """Consecutive wordpieces of one text: `ids` with the special tokens around them.

    Row `row` + i of the batch's vectors is that of piece `first` + i of the window, for i below `count`.
    """

    ids: list[int]
    row: int
    first: int
    count: int


class EncoderBatch(FullTransformerBatch):
    """The vectors of a batch of Docs: one row a wordpiece, text after text, a special token before each."""

    def __init__(self, doc_data: list[TransformerData], vectors: torch.Tensor) -> None:
        super().__init__(
            spans=[],
            wordpieces=WordpieceBatch.empty(),
            model_output=BaseModelOutput(last_hidden_state=vectors),
            align=Ragged(numpy.zeros(0, dtype="i"), numpy.zeros(0, dtype="i")),
            cached_doc_data=doc_data,
        )

    def unsplit_by_doc(self, arrays: list[list[Floats3d]]) -> "EncoderBatch":
        """The Docs' gradients, each of shape (1, wordpieces, width), as one batch's, shape (wordpieces, width)."""
        xp = get_array_module(arrays[0][0])
        return EncoderBatch([], xp2torch(xp.concatenate([gradient[0] for (gradient,) in arrays])))


class EncoderShim(HFShim):
    """Holds the transformer and its tokenizer; runs windows of wordpieces through it, many at a time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # of the update under way: the rows of the embedding table that were read, and those rows as leaves of the graph
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_bytes(self) -> bytes:
        """The tokenizer's files, the transformer's config, and its weights as safetensors: those in 16 bits that lose
        nothing by it.
        """
        module, self._model = self._model, torch.nn.Module()
        try:
            # all but the weights, which HFShim would pickle
            message = srsly.msgpack_loads(super().to_bytes())
        finally:
            self._model = module
        if message["config"]:
            message["config"].pop("_name_or_path", None)  # a folder of this machine, and another one each time
            message["state"] = save({name: _shortest(tensor) for name, tensor in module.state_dict().items()})
        return srsly.msgpack_dumps(message)

    def from_bytes(self, bytes_data: bytes) -> "EncoderShim":
        """Takes what `to_bytes` gave; the weights are 32 bits again. No code that a file brings along is run.

        Raises ValueError for a tokenizer's file whose name leads out of its folder.
        """
        message = srsly.msgpack_loads(bytes_data)
        if not message["config"]:
            return super().from_bytes(bytes_data)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            srsly.write_json(folder / "config.json", message["config"])
            settings = message["tokenizer"].pop("kwargs", {})
            for file, content in message["tokenizer"].items():
                if file in ("", "..") or Path(file).name != file:
                    raise ValueError(
                        f"The pipeline's tokenizer has a file {file!r}, expected plain names; do not use it."
                    )
                (folder / file).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(folder, **settings | {"trust_remote_code": False})
            vocab_file = getattr(tokenizer, "vocab_file", None)
            vocab_file_contents = Path(vocab_file).read_bytes() if vocab_file else None
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with no_init_weights():
                transformer = AutoModel.from_config(config, trust_remote_code=False)
        transformer.load_state_dict(load(message["state"]))
        self._model = transformer.to(get_torch_default_device()).eval()
        self._hfmodel = HFObjects(tokenizer, transformer, vocab_file_contents, SimpleFrozenDict(), SimpleFrozenDict())
        return self

    def predict(self, windows: Sequence[Window]) -> torch.Tensor:
        """The vectors of the windows' pieces, shape (rows, width), computed with dropout off."""
        transformer = self._model
        if transformer.training:
            transformer.eval()
        embeddings = transformer.get_input_embeddings()
        with torch.inference_mode(), torch.autocast("cuda", enabled=self._mixed_precision):
            return self._run(windows, embeddings)

    def begin_update(self, windows: Sequence[Window]) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        """The vectors with dropout on, and the function that takes their gradient and adds up the parameters'."""
        transformer = self._model
        transformer.train()
        weight = transformer.get_input_embeddings().weight
        ids = torch.tensor([i for window in windows for i in window.ids], device=weight.device)
        rows = ids.unique()
        leaf = weight.detach()[rows].requires_grad_(weight.requires_grad)
        self.read.append((rows, leaf))
        with torch.autocast("cuda", enabled=self._mixed_precision):
            vectors = self._run(windows, lambda ids: embedding(torch.searchsorted(rows, ids), leaf))

        def backprop(gradient: torch.Tensor) -> None:
            # what thinc's PyTorchShim does around a backward pass: scaled, so that half precision does not underflow
            gradient = self._grad_scaler.scale(gradient, inplace=True)
            torch.autograd.backward(vectors, gradient)
            parameters = [*transformer.parameters(), *(leaf for _, leaf in self.read)]
            self._grad_scaler.unscale([p.grad for p in parameters if p.grad is not None])

        return vectors, backprop

    def finish_update(self, optimizer: Optimizer) -> None:
        """Updates the parameters. An optimizer with a method `update_encoder` does it all in one call."""
        embeddings = self._model.get_input_embeddings()
        read, self.read = [(rows, leaf.grad) for rows, leaf in self.read if leaf.grad is not None], []
        parameters = [(name, p) for name, p in self._model.named_parameters() if p.grad is not None]
        if hasattr(optimizer, "update_encoder"):
            if parameters and not self._grad_scaler.found_inf:
                optimizer.update_encoder(self.id, parameters, embeddings.weight, read)
            for _, parameter in parameters:
                parameter.grad = None
            self._grad_scaler.update()
            return
        if read:
            embeddings.weight.grad = torch.zeros_like(embeddings.weight)
            for rows, gradient in read:
                embeddings.weight.grad.index_add_(0, rows, gradient)
        super().finish_update(optimizer)
        embeddings.weight.grad = None

    def _run(self, windows: Sequence[Window], embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        device = self._model.device
        outputs, places, padded = [], numpy.empty(sum(w.count for w in windows), dtype="int64"), 0
        for group in grouped_by_length(windows, GROUP_SIZE.get(device.type, GROUP_SIZE["cuda"])):
            length = max(len(window.ids) for window in group)
            ids = numpy.full((len(group), length), windows[0].ids[0], dtype="int64")  # masked: any id that is read
            mask = numpy.zeros((len(group), length), dtype="int64")
            for i, window in enumerate(group):
                ids[i, : len(window.ids)] = window.ids
                mask[i, : len(window.ids)] = 1
                first = padded + i * length + window.first
                places[window.row : window.row + window.count] = numpy.arange(first, first + window.count)
            padded += ids.size
            inputs = {"inputs_embeds": embed(torch.from_numpy(ids).to(device))}
            if not mask.all():
                inputs["attention_mask"] = torch.from_numpy(mask).to(device)
            output = self._model(**inputs)
            outputs.append(output.last_hidden_state.flatten(0, 1))
        return torch.cat(outputs)[torch.from_numpy(places).to(device)].float()


def _shortest(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in 16 bits, if all its values can be told exactly in them."""
    half = tensor.half()
    exact = tensor.dtype == torch.float32 and torch.equal(half.float(), tensor)
    return (half if exact else tensor).contiguous().cpu()


class Encoder(TransformerModel):
    """The thinc layer from Docs to an EncoderBatch; `tokenizer` and `transformer` are Hugging Face's objects."""

    def __init__(
        self, name: str, tokenizer_config: dict[str, Any], transformer_config: dict[str, Any], mixed_precision: bool
    ) -> None:
        self.arguments = (name, tokenizer_config, transformer_config, mixed_precision)
        super().__init__(name, _no_spans, tokenizer_config, transformer_config)
        objects = self.layers[0].shims[0]._hfmodel
        # a scaler that is not enabled must not be shared: spacy-transformers writes into the dict it is given
        self.layers[0].shims[0] = EncoderShim(objects, mixed_precision=mixed_precision, grad_scaler_config={})
        self.attrs["replace_listener"] = _own_encoder
        self.attrs["replace_listener_cfg"] = _own_encoder_config
        self._func = forward
        self.init = _initialize

    def copy(self) -> "Encoder":
        """A copy with weights of its own."""
        copied = Encoder(*self.arguments)
        copied.set_dim("nO", self.get_dim("nO"), force=True)
        copied.attrs["has_transformer"] = self.attrs["has_transformer"]
        copied.layers[0].shims[0] = copy.deepcopy(self.layers[0].shims[0])
        return copied


@registry.architectures("panx_xlmr.TransformerModel.v1")
def encoder(
    name: str, tokenizer_config: dict[str, Any], transformer_config: dict[str, Any], mixed_precision: bool
) -> Model[list[Doc], FullTransformerBatch]:
    """A transformer of Hugging Face's for the pipe `transformer`; the arguments are those that
    `spacy-transformers.TransformerModel.v3` has by the same names. The tokenizer must be a fast one.
    """
    return Encoder(name, tokenizer_config, transformer_config, mixed_precision)


@registry.architectures("panx_xlmr.Tok2VecTransformer.v1")
def tok2vec_encoder(
    name: str,
    tokenizer_config: dict[str, Any],
    transformer_config: dict[str, Any],
    mixed_precision: bool,
    pooling: Model[Ragged, Floats2d],
    grad_factor: float,
) -> Model[list[Doc], list[Floats2d]]:
    """The same transformer inside a pipe of its own, which is what `nlp.replace_listeners` makes of a listener; the
    last two arguments are the listener's.
    """
    model = Encoder(name, tokenizer_config, transformer_config, mixed_precision)
    return chain(_own_encoder(model), trfs2arrays(pooling, grad_factor))


def _own_encoder(model: Encoder) -> Model[list[Doc], list[TransformerData]]:
    # one node, as the listener in whose place it comes: a chain would be flattened when the config is read again
    return Model("own-encoder", _forward_own, init=_initialize_own, layers=[model])


def _forward_own(
    model: Model, docs: list[Doc], is_train: bool
) -> tuple[list[TransformerData], Callable[[list[TransformerData]], list[Doc]]]:
    batch, backprop = model.layers[0](docs, is_train)

    def backprop_batch(gradients: list[TransformerData]) -> list[Doc]:
        return backprop(batch.unsplit_by_doc([list(gradient.tensors) for gradient in gradients]))

    return batch.doc_data, backprop_batch


def _initialize_own(model: Model, X: Any = None, Y: Any = None) -> None:
    model.layers[0].initialize(X)


def _own_encoder_config(encoder_config: dict[str, Any], listener_config: dict[str, Any]) -> dict[str, Any]:
    of_listener = {key: listener_config[key] for key in ("pooling", "grad_factor")}
    return encoder_config | of_listener | {"@architectures": "panx_xlmr.Tok2VecTransformer.v1"}


def _no_spans(docs: list[Doc]) -> list[list[Span]]:
    return [[] for _ in docs]  # what is cut into windows here are wordpieces, not Docs


def _initialize(model: Encoder, X: Any = None, Y: Any = None) -> None:
    if not model.attrs["has_transformer"]:
        config = (model._init_tokenizer_config, model._init_transformer_config)
        model.attrs["set_transformer"](model, huggingface_from_pretrained(model.attrs["name"], *config))


def forward(
    model: Encoder, docs: list[Doc], is_train: bool
) -> tuple[EncoderBatch, Callable[[EncoderBatch], list[Doc]]]:
    """The vectors of the Docs' wordpieces, and the function that takes their gradient."""
    windows, aligned = wordpiece_windows(model.tokenizer, docs)
    shim = model.layers[0].shims[0]
    vectors, backprop = shim(windows, is_train)
    array, doc_data, row = torch2xp(vectors.detach()), [], 0
    for wordpieces, align in aligned:
        rows = sum(wordpieces.lengths)
        if not rows:
            doc_data.append(TransformerData.empty())
            continue
        output = BaseModelOutput(last_hidden_state=array[None, row : row + rows])
        doc_data.append(TransformerData(wordpieces=wordpieces, model_output=output, align=align))
        row += rows

    def backprop_docs(gradient: EncoderBatch) -> list[Doc]:
        backprop(gradient.model_output.last_hidden_state)
        return docs

    return EncoderBatch(doc_data, vectors), backprop_docs


def wordpiece_windows(
    tokenizer: PreTrainedTokenizerFast, docs: Sequence[Doc]
) -> tuple[list[Window], list[tuple[WordpieceBatch, Ragged]]]:
    """The windows of all Docs, and for each Doc its wordpieces and how its tokens align with them.

    A Doc's wordpieces are one sequence that begins with the special token before a text; a Doc without tokens has
    none. A token aligns with every wordpiece that holds one of its characters, or else with the special token.
    Raises ValueError for a tokenizer that does not say where in the text its wordpieces stand.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer, so that wordpieces cannot be aligned with tokens; give "
            "an encoder with a tokenizer.json, or install what converts its tokenizer."
        )
    before, after = special_ids(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    encodings = tokenizer.backend_tokenizer.encode_batch([doc.text for doc in docs], add_special_tokens=False)
    windows, aligned, row = [], [], 0
    for doc, encoding in zip(docs, encodings, strict=True):
        if not len(doc):
            aligned.append((WordpieceBatch.empty(), Ragged(numpy.zeros(0, dtype="i"), numpy.zeros(0, dtype="i"))))
            continue
        ids = encoding.ids
        for start, end, first, last in window_bounds(len(ids)):
            # the text's first row is that of the special token, which its first window has just before its wordpieces
            special = int(start == 0)
            windows.append(
                Window(
                    ids=[*before, *ids[start:end], *after],
                    row=row + 1 + first - special,
                    first=len(before) + first - start - special,
                    count=last - first + special,
                )
            )
        wordpieces = WordpieceBatch(
            strings=[[tokenizer.convert_ids_to_tokens(before[-1]), *encoding.tokens]],
            input_ids=numpy.array([[before[-1], *ids]], dtype="i"),
            attention_mask=numpy.ones((1, len(ids) + 1), dtype="f"),
            lengths=[len(ids) + 1],
            token_type_ids=None,
        )
        aligned.append((wordpieces, align_tokens(doc, encoding.offsets)))
        row += len(ids) + 1
    return windows, aligned


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text.

    Raises ValueError where there is none before it.
    """
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(1, len(whole)):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(f"{type(tokenizer).__name__} puts no special token before a text; give an encoder whose does.")


def window_bounds(length: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows over `length` wordpieces: (start, end, first, last).

    The window holds the wordpieces from `start` up to `end`, and gives the vectors from `first` up to `last`: where two
    windows overlap, each half of the overlap belongs to the window that shows more on its other side.
    """
    start = 0
    while True:
        end = min(start + WINDOW, length)
        yield start, end, start + (OVERLAP // 2 if start else 0), end - (OVERLAP // 2 if end < length else 0)
        if end == length:
            return
        start = end - OVERLAP


def align_tokens(doc: Doc, offsets: Sequence[tuple[int, int]]) -> Ragged:
    """Which rows of the Doc's wordpieces each token has: row i + 1 for wordpiece i, row 0 where there is none.

    offsets: for each wordpiece, where in the text its characters begin and end; the space before a word is one of them,
    and a wordpiece that stands for such a space only is passed over.
    """
    starts, ends = numpy.array(offsets, dtype="int64").reshape(-1, 2).T
    token_starts = numpy.array([token.idx for token in doc], dtype="int64")
    token_ends = token_starts + numpy.array([len(token) for token in doc], dtype="int64")
    first = numpy.searchsorted(starts, token_starts, side="right") - 1
    covers = first >= 0
    if len(ends):
        covers &= ends[first] > token_starts
    first = numpy.where(covers, first, first + 1)
    lengths = numpy.searchsorted(starts, token_ends, side="left") - first
    rows = numpy.where(lengths > 0, first + 1, 0)
    lengths = numpy.maximum(lengths, 1)
    # each token's rows are consecutive: count up from its first one
    step = numpy.arange(lengths.sum()) - numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
    return Ragged((numpy.repeat(rows, lengths) + step).astype("i"), lengths.astype("i"))


def grouped_by_length(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Windows of like length together, at most `size` wordpieces a group with padding, at least one window."""
    group: list[Window] = []
    for window in sorted(windows, key=lambda window: len(window.ids)):
        if group and len(window.ids) * (len(group) + 1) > size:
            yield group
            group = []
        group.append(window)
    if group:
        yield group
