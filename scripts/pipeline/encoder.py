"""The transformer layer `panx_xlmr.TransformerModel.v1`: what spacy-transformers' own computes, at less cost.

It fits into spacy-transformers' `transformer` pipe and feeds its listeners. It differs from
`spacy-transformers.TransformerModel.v3` in this:

- A Doc's text is tokenized as a whole, in time linear in its length, and cut into windows of wordpieces, not of tokens.
  Every wordpiece gets its vector from the window in which it has most context, and every token has a vector: one
  without a wordpiece (white space, a zero-width character) takes that of the text's first special token.
- Windows of like length run together, so that little is spent on padding.
- On a CPU oneDNN multiplies the matrices, and prediction in 16 or 8 bits is there for the asking.
- In training only the embeddings that a batch reads have a gradient, not the whole table.
"""

import copy
import os
import platform
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
Precision = Literal["float32", "bfloat16", "int8"]
# On these processors PyTorch multiplies float32 matrices with MKL unless it is told otherwise.
HAS_ONEDNN = platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


if hasattr(os, "register_at_fork"):  # nlp.pipe(n_process=…) forks
    # the tokenizer's threads: left out in a forked process, with a warning where the variable is not set
    os.register_at_fork(before=lambda: os.environ.setdefault("TOKENIZERS_PARALLELISM", "false"))
    # a forked process would wait without end for the threads that PyTorch had started in its parent
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


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


class _OneDnnLinear(torch.autograd.Function):
    """x Wᵀ + b and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _multiply(gradient, weight.t()) if wants_x else None,
            _multiply(rows.t(), x.flatten(0, -2).t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # the operator with which PyTorch's own compiler calls oneDNN
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(torch.nn.Linear):
    """PyTorch's linear layer, by oneDNN on a CPU.

    PyTorch takes MKL for float32 there, which can be half as fast: benchmarks/speed.py compares both.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, shape (…, in), times the weights, shape (…, out)."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
            return super().forward(x)
        if torch.is_grad_enabled():
            return _OneDnnLinear.apply(x, self.weight, self.bias)
        return _multiply(x, self.weight, self.bias)


class Int8Linear(torch.nn.Module):
    """A linear layer with weights in 8 bits, one scale for each row, that rounds its input to 8 bits too (FBGEMM)."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).double()
        with warnings.catch_warnings():
            # deprecated in favour of a package that has no such layer for CPUs without a C++ compiler
            warnings.filterwarnings("ignore", category=UserWarning)
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, shape (…, in), times the weights, shape (…, out)."""
        return torch.ops.quantized.linear_dynamic(x, self.packed)


class BFloat16Linear(torch.nn.Module):
    """A linear layer that multiplies in bfloat16, between float32 and float32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = (p if p is None else p.detach().bfloat16() for p in (linear.weight, linear.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, shape (…, in), times the weights, shape (…, out)."""
        return torch.nn.functional.linear(x.bfloat16(), self.weight, self.bias).float()


def _reduce_linear(module: torch.nn.Module) -> None:
    """Puts linear layers in 8 bits into a transformer, in bfloat16 behind an activation (fewer outputs than inputs):
    a few of its values are many times as large as the others, which 8 bits would not tell apart.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, (BFloat16Linear if child.in_features > child.out_features else Int8Linear)(child))
        else:
            _reduce_linear(child)


def lean(transformer: torch.nn.Module) -> torch.nn.Module:
    """The same transformer with this file's linear layers, and without the pooler, whose output nobody reads."""
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None
    if HAS_ONEDNN:
        for module in transformer.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear  # parameters and names stay what they are
    return transformer


def check_tokenizer_config(config: dict[str, Any]) -> None:
    """Raises ValueError where a tokenizer_config.json names files: transformers would read them wherever they are, and
    a pipeline would carry them along.
    """
    if named := [name for name in ("vocab_file", "tokenizer_file", "merges_file", "spm_file") if config.get(name)]:
        raise ValueError(f"The tokenizer's tokenizer_config.json names a file of its own ({named[0]}); do not use it.")


class EncoderShim(HFShim):
    """Holds the transformer and its tokenizer; runs windows of wordpieces through it, many at a time."""

    def __init__(self, *args: Any, precision: Precision, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.precision = precision
        self.reduced: torch.nn.Module | None = None  # the transformer's copy for prediction in that precision
        # since the last update: the rows of the embedding table that were read, and those rows as leaves of the graph
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_bytes(self) -> bytes:
        """The tokenizer's files, the transformer's config, and its weights as safetensors, in as few bits as lose
        nothing of them.
        """
        module, self._model = self._model, torch.nn.Module()
        try:
            # all but the weights, which HFShim would pickle
            message = srsly.msgpack_loads(super().to_bytes())
        finally:
            self._model = module
        if message["config"]:
            # where it was loaded from, a temporary folder maybe: the same pipeline is to be the same bytes
            message["config"].pop("_name_or_path", None)
            message["state"] = save(_shortest(module.state_dict()))
        return srsly.msgpack_dumps(message)

    def from_bytes(self, bytes_data: bytes) -> "EncoderShim":
        """Takes what `to_bytes` gave; the weights are 32 bits again. No code that a file brings along is run.

        Raises ValueError for a tokenizer's file whose name leads out of its folder, and for a tokenizer that names
        files of its own.
        """
        message = srsly.msgpack_loads(bytes_data)
        if not message["config"]:
            return super().from_bytes(bytes_data)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            srsly.write_json(folder / "config.json", message["config"])
            settings = {"use_fast": bool(message["tokenizer"].pop("kwargs", {}).get("use_fast", True))}
            for file, content in message["tokenizer"].items():
                if file in ("", "..") or Path(file).name != file:
                    raise ValueError(
                        f"The pipeline's tokenizer has a file {file!r}, expected plain names; do not use it."
                    )
                (folder / file).write_bytes(content)
            check_tokenizer_config(srsly.json_loads(message["tokenizer"].get("tokenizer_config.json", b"{}")))
            tokenizer = AutoTokenizer.from_pretrained(folder, **settings, trust_remote_code=False)
            vocab_file = getattr(tokenizer, "vocab_file", None)
            vocab_file_contents = Path(vocab_file).read_bytes() if vocab_file else None
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with no_init_weights():
                transformer = AutoModel.from_config(config, trust_remote_code=False)
        lean(transformer).load_state_dict(_full(load(message["state"])))
        self._model, self.reduced = transformer.to(get_torch_default_device()).eval(), None
        self._hfmodel = HFObjects(tokenizer, transformer, vocab_file_contents, SimpleFrozenDict(), SimpleFrozenDict())
        return self

    def predict(self, windows: Sequence[Window]) -> torch.Tensor:
        """The vectors of the windows' pieces, shape (rows, width), computed with dropout off."""
        if self._model.training:
            self._model.eval()
        with torch.inference_mode(), torch.autocast("cuda", enabled=self._mixed_precision):
            return self._run(windows, self._model.get_input_embeddings(), self._predicting())

    def begin_update(self, windows: Sequence[Window]) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        """The vectors with dropout on, and the function that takes their gradient and adds up the parameters'."""
        transformer = self._model
        transformer.train()
        weight = transformer.get_input_embeddings().weight
        ids = torch.tensor([i for window in windows for i in window.ids], device=weight.device)
        rows = ids.unique()
        leaf = weight.detach()[rows].requires_grad_(weight.requires_grad)
        with torch.autocast("cuda", enabled=self._mixed_precision):
            vectors = self._run(windows, lambda ids: embedding(torch.searchsorted(rows, ids), leaf), transformer)

        def backprop(gradient: torch.Tensor) -> None:
            # what thinc's PyTorchShim does around a backward pass: scaled, so that half precision does not underflow
            gradient = self._grad_scaler.scale(gradient, inplace=True)
            torch.autograd.backward(vectors, gradient)
            self.read.append((rows, leaf))
            parameters = [*transformer.parameters(), leaf]
            self._grad_scaler.unscale([p.grad for p in parameters if p.grad is not None])

        return vectors, backprop

    def finish_update(self, optimizer: Optimizer) -> None:
        """Updates the parameters. An optimizer with a method `update_encoder` does it all in one call."""
        self.reduced = None
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

    def _predicting(self) -> torch.nn.Module:
        """The transformer in the precision asked for; the table of embeddings is not copied."""
        if self.precision == "float32":
            return self._model
        if self.reduced is None:
            device = self._model.device
            table = self._model.get_input_embeddings()
            self.reduced = copy.deepcopy(self._model, {id(table): torch.nn.Identity()})
            if self.precision == "bfloat16":
                self.reduced.to(torch.bfloat16)
            elif device.type == "cpu":
                _reduce_linear(self.reduced)
            else:
                raise ValueError(f"Precision int8 is for the CPU, but the pipeline is on {device}; take bfloat16.")
        return self.reduced

    def _run(
        self,
        windows: Sequence[Window],
        embed: Callable[[torch.Tensor], torch.Tensor],
        transformer: torch.nn.Module,
    ) -> torch.Tensor:
        device, dtype = transformer.device, transformer.dtype
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
            inputs = {"inputs_embeds": embed(torch.from_numpy(ids).to(device)).to(dtype)}
            if not mask.all():
                inputs["attention_mask"] = torch.from_numpy(mask).to(device)
            output = transformer(**inputs)
            outputs.append(output.last_hidden_state.flatten(0, 1))
        return torch.cat(outputs)[torch.from_numpy(places).to(device)].float()


def row_scales(matrix: torch.Tensor) -> torch.Tensor:
    """For each row of a matrix, shape (rows, 1), the step at which 8-bit integers times it reach over the row's values.

    A step has 16 significant bits only, so that its product with an 8-bit integer is exact in float32.
    """
    steps = (matrix.abs().amax(dim=1, keepdim=True) / 127).contiguous()
    rounded_up = ((steps.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    return torch.where(rounded_up > 0, rounded_up, 1.0)


def _shortest(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in as few bits as lose nothing: 8 and a scale for each row of a matrix, 16, or what they had."""
    short = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        short[name] = tensor
        if tensor.dtype != torch.float32:
            continue
        half = tensor.half()
        if torch.equal(half.float(), tensor):
            short[name] = half
        if tensor.dim() == 2:
            scales = row_scales(tensor)
            rows = (tensor / scales).round()
            if torch.equal(rows * scales, tensor):
                short |= {name: rows.to(torch.int8), f"{name}.scales": scales}
    return short


def _full(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that `_shortest` made short, in float32."""
    return {
        name: tensor * weights[f"{name}.scales"] if f"{name}.scales" in weights else tensor
        for name, tensor in weights.items()
        if not name.endswith(".scales")
    }


class Encoder(TransformerModel):
    """The thinc layer from Docs to an EncoderBatch; `tokenizer` and `transformer` are Hugging Face's objects."""

    def __init__(
        self,
        name: str,
        tokenizer_config: dict[str, Any],
        transformer_config: dict[str, Any],
        mixed_precision: bool,
        precision: Precision,
    ) -> None:
        self.arguments = (name, tokenizer_config, transformer_config, mixed_precision, precision)
        super().__init__(name, _no_spans, tokenizer_config, transformer_config)
        objects = self.layers[0].shims[0]._hfmodel
        # a scaler that is not enabled must not be shared: spacy-transformers writes into the dict it is given
        self.layers[0].shims[0] = EncoderShim(
            objects, precision=precision, mixed_precision=mixed_precision, grad_scaler_config={}
        )
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
    name: str,
    tokenizer_config: dict[str, Any],
    transformer_config: dict[str, Any],
    mixed_precision: bool,
    precision: Precision = "float32",
) -> Model[list[Doc], FullTransformerBatch]:
    """A transformer of Hugging Face's for the pipe `transformer`; the first four arguments are those that
    `spacy-transformers.TransformerModel.v3` has by the same names. The tokenizer must be a fast one.

    precision: in which the matrices are multiplied in prediction. bfloat16 and int8 (which is for CPUs) are faster and
    not exact: benchmarks/speed.py. Weights are kept, trained and stored in float32 all the same.
    """
    return Encoder(name, tokenizer_config, transformer_config, mixed_precision, precision)


@registry.architectures("panx_xlmr.Tok2VecTransformer.v1")
def tok2vec_encoder(
    name: str,
    tokenizer_config: dict[str, Any],
    transformer_config: dict[str, Any],
    mixed_precision: bool,
    pooling: Model[Ragged, Floats2d],
    grad_factor: float,
    precision: Precision = "float32",
) -> Model[list[Doc], list[Floats2d]]:
    """The same transformer inside a pipe of its own, which is what `nlp.replace_listeners` makes of a listener, whose
    arguments `pooling` and `grad_factor` are.
    """
    model = Encoder(name, tokenizer_config, transformer_config, mixed_precision, precision)
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
        objects = huggingface_from_pretrained(model.attrs["name"], *config)
        lean(objects.transformer)
        model.attrs["set_transformer"](model, objects)


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
