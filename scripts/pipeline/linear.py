"""Linear layers for CPUs: float32 with the faster of two matrix kernels, bfloat16 and int8."""

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
    """A linear layer with 8-bit weights, one scale per row, that also rounds its input to 8 bits (FBGEMM)."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).double()
        with warnings.catch_warnings():
            # deprecated in favour of a package whose layer needs a C++ compiler on CPUs
            warnings.filterwarnings("ignore", category=UserWarning)
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x of shape (…, in) to shape (…, out)."""
        return torch.ops.quantized.linear_dynamic(x, self.packed)


class BFloat16Linear(torch.nn.Module):
    """A linear layer that multiplies in bfloat16; input and output are float32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = (p if p is None else p.detach().bfloat16() for p in (linear.weight, linear.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x of shape (…, in) to shape (…, out)."""
        return torch.nn.functional.linear(x.bfloat16(), self.weight, self.bias).float()


@registry.misc("panx_xlmr.FasterLinear.v1")
def faster_linear(transformer: torch.nn.Module) -> None:
    """Let a transformer's linear layers use the faster matrix kernel of this processor."""
    if USE_ONEDNN:
        for module in transformer.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear  # parameters and names stay the same


@registry.misc("panx_xlmr.Int8Linear.v1")
def int8_linear(module: torch.nn.Module) -> None:
    """Replace a transformer's linear layers by 8-bit ones, and by bfloat16 ones behind an activation.

    Behind an activation (fewer outputs than inputs) a few values are many times larger than the others, so that 8 bits
    would not resolve the rest.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, (BFloat16Linear if child.in_features > child.out_features else Int8Linear)(child))
        else:
            int8_linear(child)
