"""Linear layers for CPUs: float32 with the faster of two matrix kernels, and int8."""

import platform
import warnings
from typing import Any

import torch
from spacy import registry

# PyTorch multiplies float32 matrices with MKL. oneDNN is faster where AVX-512 is there, slower elsewhere
# (benchmarks/speed.py measures both).
HAS_ONEDNN = platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
USE_ONEDNN = HAS_ONEDNN and "AVX512" in torch.backends.cpu.get_cpu_capability()


class _OneDnnLinear(torch.autograd.Function):
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


class Linear(torch.nn.Linear):
    """PyTorch's linear layer, computed by oneDNN on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x of shape (…, in) to shape (…, out)."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
            return super().forward(x)
        if torch.is_grad_enabled():
            return _OneDnnLinear.apply(x, self.weight, self.bias)
        return _multiply(x, self.weight, self.bias)


class Int8Linear(torch.nn.Module):
    """A linear layer with 8-bit weights, one scale per row, that rounds each row of its input to 7 bits (FBGEMM).

    Each input row has its own scale, so that a text's vectors do not depend on the rest of its batch. Seven bits,
    because processors without VNNI add products in 16 bits, which two products of 8 bits exceed.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).double()
        self.bias = None if linear.bias is None else linear.bias.detach()
        engine = torch.backends.quantized.engine
        with warnings.catch_warnings():
            # deprecated in favour of a package whose layer needs a C++ compiler on CPUs
            warnings.filterwarnings("ignore", category=UserWarning)
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            torch.backends.quantized.engine = "fbgemm"  # the only one that takes a given scale and returns float32
            self.packed = torch.ops.quantized.linear_prepack(rounded)
            torch.backends.quantized.engine = engine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x of shape (…, in) to shape (…, out)."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / largest, 1 / 63, 64, self.packed)
        return y * largest if self.bias is None else torch.addcmul(self.bias, y, largest)


@registry.misc("panx_xlmr.FasterLinear.v1")
def faster_linear(transformer: torch.nn.Module) -> None:
    """Let a transformer's linear layers use the faster matrix kernel of this processor."""
    if USE_ONEDNN:
        for module in transformer.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear  # parameters and names stay the same


@registry.misc("panx_xlmr.Int8Linear.v1")
def int8_linear(linear: torch.nn.Linear) -> torch.nn.Module:
    """Return an 8-bit copy of a linear layer."""
    return Int8Linear(linear)


@registry.misc("panx_xlmr.HasBFloat16.v1")
def has_bfloat16() -> bool:
    """Return whether this processor has instructions for bfloat16; without them it is slower than float32."""
    # the capability is lower where the user limits PyTorch's kernels
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
