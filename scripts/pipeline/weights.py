"""Weights in few bits: losslessly, in the smallest of int8 with a scale per row, float16 and float32."""

import torch
from spacy import registry


def row_scales(matrix: torch.Tensor) -> torch.Tensor:
    """Return the quantization step of each row of a matrix, shape (rows, 1), for 8-bit integers.

    A step has 16 significant bits, so that its product with an 8-bit integer is exact in float32.
    """
    steps = (matrix.abs().amax(dim=1, keepdim=True) / 127).contiguous()
    rounded_up = ((steps.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    return torch.where(rounded_up > 0, rounded_up, 1.0)


@registry.misc("panx_xlmr.ShortestWeights.v1")
def shortest(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Store weights losslessly in the smallest of int8 with a scale per row (matrices), float16 and float32."""
    short = {}
    for name, tensor in weights.items():
        short[name] = tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype != torch.float32:
            continue
        if tensor.dim() == 2 and (rows := _in_8_bits(tensor)):
            short |= {name: rows[0], f"{name}.scales": rows[1]}
        elif torch.equal((half := tensor.half()).float(), tensor):
            short[name] = half
    return short


def _in_8_bits(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the matrix as int8 and scales of shape (rows, 1), or None if that would lose anything."""
    for part in (matrix[:8], matrix):  # unrounded weights fail at the first eight rows already
        scales = row_scales(part)
        rows = (part / scales).round()
        if not torch.equal(rows * scales, part):
            return None
    return rows.to(torch.int8), scales


@registry.misc("panx_xlmr.FullWeights.v1")
def full(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that `shortest` stored, in float32. Empties `weights` to save memory."""
    scales = {name: weights.pop(name) for name in list(weights) if name.endswith(".scales")}
    floats = {}
    while weights:
        name, tensor = weights.popitem()
        floats[name] = tensor.float()
        if f"{name}.scales" in scales:
            floats[name] *= scales[f"{name}.scales"]
    return floats
