"""Linear layers for CPUs: float32 with the faster of two matrix kernels, and int8."""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from spacy import registry
from torch.nn.functional import linear


def _has_avx512() -> bool:
    # lower where the user limits PyTorch's kernels
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


# A text that shows int8 which input channels of a layer are large; they are the same in every text.
SAMPLE = (
    "Giovedì mattina il sindaco di Rovigo, Paola Ferretti, ha incontrato all'ospedale Santa Maria i medici della "
    "clinica: «Non chiuderemo il reparto», ha detto. Nel 1987 la squadra aveva vinto 3-1 a Berlino! E tu, che ne pensi?"
)
# Steps from the middle to the largest input in int8. Without VNNI, processors add two products in 16 bits, which
# products of 8-bit inputs overflow: inputs have 7 bits.
LEVELS = 127 if _has_avx512() and torch.cpu._is_vnni_supported() else 63


class _OneDnnProduct(torch.autograd.Function):
    """Compute x Wᵀ + b and its gradients with oneDNN."""

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
    # the operator that PyTorch's compiler calls oneDNN with
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnnLinear(torch.nn.Linear):
    """PyTorch's linear layer, computed by oneDNN on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x of shape (…, in) to shape (…, out)."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        if torch.is_grad_enabled():
            return _OneDnnProduct.apply(x, self.weight, self.bias)
        return _multiply(x, self.weight, self.bias)


class Int8Linear(torch.nn.Module):
    """A linear layer that multiplies 8-bit integers (oneDNN).

    Each row of the weights has its own scale. Each row of the input has its own scale and middle: a text's vectors do
    not depend on the rest of its batch, and most inputs after GELU are positive. A few input channels are much larger
    than the others: each channel is divided by a factor that its weights are multiplied by (SmoothQuant, Xiao et al.
    2023, with alpha 0.5).
    """

    def __init__(self, layer: torch.nn.Linear, largest: torch.Tensor) -> None:
        """Make an 8-bit copy of a layer. largest: the largest absolute value of each input channel, shape (in,)."""
        super().__init__()
        weight = layer.weight.detach()
        smooth = (largest.clamp_min(1e-5) / weight.abs().amax(dim=0).clamp_min(1e-5)).sqrt()
        self.inverse, self.bias = 1 / smooth, None if layer.bias is None else layer.bias.detach()
        weight = weight * smooth
        self.scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        rounded = (weight / self.scales[:, None]).round()
        self.sums = rounded.sum(dim=1) * self.scales  # subtracting `middle` from x subtracts middle · sums from y
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x of shape (…, in) to shape (…, out)."""
        rows = x.flatten(0, -2) * self.inverse
        least, largest = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)  # aminmax is 20 times slower
        middle, step = (largest + least) / 2, ((largest - least) / (2 * LEVELS)).clamp_min(1e-12)
        # in place, since new tensors cost more time than the arithmetic; through int8, which is the faster cast
        integers = rows.sub_(middle).mul_(1 / step).round_().to(torch.int8).view(torch.uint8).add_(LEVELS + 1)
        weights = self.packed, self.scales, self.zeros
        output = None, 1.0, 0, torch.float32, "none", [], ""  # bias, scale, zero point, type, no activation
        y = torch.ops.onednn.qlinear_pointwise(integers, 1.0, LEVELS + 1, *weights, *output)
        y.mul_(step).addcmul_(middle, self.sums)
        return (y if self.bias is None else y.add_(self.bias)).unflatten(0, x.shape[:-1])


@cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN is the faster float32 kernel: on a processor with AVX-512 that is not Intel's.

    PyTorch's own kernel, MKL, is at least as fast on the others (docs/performance.md). The two are not timed here: they
    round differently, and the same training must have the same result on a busy machine.
    """
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and _has_avx512() and "Intel" not in processor


@registry.misc("panx_xlmr.FasterLinear.v1")
def faster_linear(transformer: torch.nn.Module) -> None:
    """Let a transformer's linear layers use the faster matrix kernel of this processor."""
    if onednn_is_faster():
        for module in transformer.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = OneDnnLinear  # parameters and names stay the same


@registry.misc("panx_xlmr.Int8Layers.v2")
def int8_layers(transformer: torch.nn.Module, embed: Callable[[str], torch.Tensor]) -> dict[int, Int8Linear]:
    """Return an 8-bit copy of each linear layer of a transformer, by the layer's id.

    embed: returns the embeddings of a text's wordpieces, shape (1, pieces, width).
    """
    largest: dict[torch.nn.Linear, torch.Tensor] = {}

    def look(layer: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> None:
        largest[layer] = inputs[0].abs().flatten(0, -2).amax(dim=0)

    hooks = [m.register_forward_pre_hook(look) for m in transformer.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        transformer(inputs_embeds=embed(SAMPLE))
    for hook in hooks:
        hook.remove()
    return {id(layer): Int8Linear(layer, values) for layer, values in largest.items()}


@registry.misc("panx_xlmr.HasBFloat16.v1")
@cache
def has_bfloat16() -> bool:
    """Return whether this processor has instructions for bfloat16, and is faster with them than in float32."""
    if not (_has_avx512() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())):
        return False
    multiply = _multiply if onednn_is_faster() else linear
    x, weight = torch.ones(128, 384), torch.ones(1536, 384)
    short_x, short_weight = x.bfloat16(), weight.bfloat16()
    with torch.inference_mode():
        times = [
            (timeit(lambda: multiply(x, weight), number=1), timeit(lambda: linear(short_x, short_weight), number=1))
            for _ in range(10)
        ]
    float32, bfloat16 = map(min, zip(*times, strict=True))  # other processes can only make a kernel slower
    return bfloat16 < float32
