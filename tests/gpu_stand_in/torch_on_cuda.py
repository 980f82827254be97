"""PyTorch tensors that say they are on cuda:0, hold their values on the CPU, and refuse tensors that are on the CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from gpu_stand_in import AUTOCAST, KERNEL, SYNC, TO_DEVICE, count
from gpu_stand_in.cupy_on_numpy import Capsule

CUDA = torch.device("cuda", 0)
# operators that start no kernel
VIEWS = {"view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {"detach", "alias", "as_strided", "split", "split_with_sizes", "_reshape_alias", "unbind", "diagonal"}
VIEWS |= {"lift_fresh", "empty", "empty_strided", "empty_like"}
# operators that start several kernels, and how many (read in PyTorch's sources)
KERNELS = {"logsumexp": 9}
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# functions that autocast computes in half precision and in float32; PyTorch lists more that the project does not call
HALF = {"linear", "matmul", "bmm", "mm", "addmm", "scaled_dot_product_attention"}
FULL = {"layer_norm", "softmax", "logsumexp", "sum", "exp", "log"}


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0; `host` holds its values. PyTorch's C++ code believes that it is on "meta"."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool = False) -> "CudaTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), dtype=host.dtype, device="meta", requires_grad=requires_grad
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(operator, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    @property
    def data(self) -> "CudaTensor":
        return self.detach()

    @data.setter
    def data(self, new: "CudaTensor") -> None:
        assert isinstance(new, CudaTensor), "a tensor on the CPU as .data of one on cuda:0"
        torch.Tensor.data.__set__(self, new)
        self.host = new.host

    def tolist(self) -> list:
        count(SYNC)
        return self.host.tolist()

    def numpy(self, **kwargs: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo: dict) -> "CudaTensor":
        if id(self) not in memo:
            memo[id(self)] = CudaTensor(self.host.clone(), self.requires_grad)
            memo[id(self)]._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]


def _host(value: Any) -> Any:
    return value.host if isinstance(value, CudaTensor) else value


def run(operator: Any, args: tuple, kwargs: dict) -> Any:
    """Compute an operator on the tensors' values, if it is the device's, and count it. Raises for mixed devices."""
    name = operator._schema.name.removeprefix("aten::")
    values = tree_flatten((args, kwargs))[0]
    on_device = [value for value in values if isinstance(value, CudaTensor)]
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if not on_device and target not in ("cuda", "meta"):
        return operator(*args, **kwargs)
    if target:
        kwargs = kwargs | {"device": "cpu"}
    # CPU tensors: scalars are kernel arguments; an index is copied to the device
    on_host = [v for v in values if isinstance(v, torch.Tensor) and not isinstance(v, CudaTensor) and v.dim()]
    if on_device and on_host and name not in (*INDEXING, "copy_"):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {operator}")
    copied = on_device and target == "cpu" or (name == "copy_" and not isinstance(args[0], CudaTensor))
    if copied or name in SYNCHRONISING or (name in INDEXING and any(v.dtype == torch.bool for v in on_device)):
        count(SYNC)
    elif on_host and (name in (*INDEXING, "copy_") or target):
        count(TO_DEVICE)
    elif name == "_to_copy" and kwargs.get("dtype") in (None, args[0].dtype) and target:
        return CudaTensor(args[0].host)  # it is there
    elif name not in VIEWS:
        count(KERNEL, _kernels(name, args))
    host_args, host_kwargs = tree_map(_host, args), tree_map(_host, kwargs)
    result = operator(*host_args, **host_kwargs)
    if copied and name == "_to_copy":
        return result
    # an operator in place returns its argument
    known = {id(tensor.host): tensor for tensor in on_device}
    return tree_map(
        lambda value: known.get(id(value), CudaTensor(value)) if isinstance(value, torch.Tensor) else value, result
    )


def _kernels(name: str, args: tuple) -> int:
    lists = [some for some in args if isinstance(some, list) and some and isinstance(some[0], torch.Tensor)]
    if name.startswith("_foreach") and any(len({t.shape for t in group}) > 1 for group in zip(*lists, strict=True)):
        return len(lists[0])  # tensors of two shapes, one by one
    return KERNELS.get(name, 1)


class Dispatch(TorchDispatchMode):
    """Sends operators without a tensor on the device, such as torch.zeros(…, device="cuda"), to `run`."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(operator, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Autocast, and attention in one kernel, which PyTorch's C++ code would choose for a CUDA tensor only."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if not any(isinstance(value, CudaTensor) for value in tree_flatten((args, kwargs))[0]):
            return function(*args, **kwargs)
        if torch.is_autocast_enabled("cuda") and name in HALF | FULL:
            count(AUTOCAST)
            dtype = torch.get_autocast_dtype("cuda") if name in HALF else torch.float32
            args, kwargs = tree_map(lambda value: _cast(value, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            query, key, value = args[:3]
            mask = kwargs.get("attn_mask")
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return attend(query, key, value, attn_mask=mask, scale=kwargs.get("scale"))[0]
        return function(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, CudaTensor) and value.is_floating_point() else value


def to_dlpack(tensor: CudaTensor) -> Capsule:
    if tensor.requires_grad:
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
    return Capsule(tensor.host.detach().numpy())


def install() -> None:
    """Make PyTorch say that it has one CUDA device, and enter the modes for the rest of the process."""
    from_dlpack = torch.utils.dlpack.from_dlpack
    torch.utils.dlpack.to_dlpack = to_dlpack
    torch.utils.dlpack.from_dlpack = lambda memory: (
        CudaTensor(torch.from_numpy(memory.array)) if isinstance(memory, Capsule) else from_dlpack(memory)
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "stand-in",
        "get_device_capability": (9, 0),
        "mem_get_info": (8 * 10**9, 8 * 10**9),
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
    }
    does_nothing = ("_lazy_init", "set_device", "manual_seed_all", "synchronize", "reset_peak_memory_stats")
    answers |= dict.fromkeys(does_nothing)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.version.cuda = "12.8"
    # torch.tensor(…, device="cuda") makes a CPU tensor first, and copies it where the modes see it
    torch._C._set_only_lift_cpu_tensors(True)
    # tensors without memory of their own know no inference mode
    torch.inference_mode = torch.no_grad

    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():  # transformers builds models on the device "meta"
            return load(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    Dispatch().__enter__()
    Functions().__enter__()
