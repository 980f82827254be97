"""A stand-in for a GPU: it makes the project's GPU path run on a CPU, and counts what a GPU would be asked to do.

`install()` before thinc is imported gives this process CuPy arrays that are NumPy's and PyTorch tensors that say they
are on "cuda:0". As on a GPU, host arrays are refused where device arrays are expected and tensors of two devices are
refused. `COUNTS` holds PyTorch's kernels, copies to the device and synchronisations.

It cannot show: real kernels, their numbers (fp16 rounds differently), streams, races, memory, a driver, speed, or
whether CuPy's libraries load. A kernel is one operator call, except for the operators in `torch_on_cuda.KERNELS`. It
depends on private functions of the PyTorch that requirements.txt pins. benchmarks/gpu_check.py shows the rest on a GPU.
"""

import sys
from collections import Counter

# (what, module): calls, by the innermost module that is neither PyTorch nor this package
COUNTS: Counter[tuple[str, str]] = Counter()
KERNEL, TO_DEVICE, SYNC, AUTOCAST = "kernel", "copy to the device", "sync", "autocast"


def count(what: str, times: int = 1) -> None:
    """Count a call for the module that made it."""
    frame = sys._getframe(1)
    while (name := frame.f_globals.get("__name__", "")).split(".")[0] == "torch" or name.startswith(__name__):
        frame = frame.f_back
    COUNTS[what, name] += times


def counted(what: str, module: str = "") -> int:
    """Return how often something was counted for modules whose name begins with `module`."""
    return sum(times for (kind, name), times in COUNTS.items() if kind == what and name.startswith(module))


def install() -> None:
    """Put the stand-in in the place of CuPy and of PyTorch's CUDA, for the rest of the process."""
    assert "thinc" not in sys.modules, "thinc looks for a GPU when it is imported"
    from gpu_stand_in import cupy_on_numpy, torch_on_cuda

    sys.modules |= cupy_on_numpy.modules()
    torch_on_cuda.install()
