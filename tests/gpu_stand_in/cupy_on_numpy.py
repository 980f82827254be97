"""CuPy's arrays on NumPy: any other array is refused, as CuPy refuses it."""

import contextlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy

from gpu_stand_in import SYNC, TO_DEVICE, count


class Capsule:
    """Memory on its way between CuPy and PyTorch."""

    def __init__(self, array: numpy.ndarray) -> None:
        self.array = array


def to_host(value: Any) -> Any:
    """Return the NumPy arrays behind CuPy's. Raises TypeError for NumPy's own."""
    if isinstance(value, numpy.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(map(to_host, value))
    return value.host if isinstance(value, ndarray) else value


def to_device(value: Any) -> Any:
    """Return NumPy's arrays and scalars as CuPy's arrays, which a CuPy function never returns as scalars."""
    if isinstance(value, list | tuple):
        return type(value)(map(to_device, value))
    return ndarray(numpy.asarray(value)) if isinstance(value, numpy.ndarray | numpy.generic) else value


def index(key: Any) -> Any:
    """Return an index for the NumPy array; one on the host is copied to the device, a boolean one synchronises."""
    if isinstance(key, tuple):
        return tuple(map(index, key))
    if isinstance(key, numpy.ndarray | list):
        count(TO_DEVICE)
    if isinstance(key, ndarray):
        if key.dtype == bool:
            count(SYNC)
        return key.host
    return key


class ndarray:
    """An array on the device; `host` holds its values."""

    __array_ufunc__ = None  # so that NumPy's operators leave a mixed operation to this class, which refuses it

    def __init__(self, host: numpy.ndarray) -> None:
        self.host = host

    def __array__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __getattr__(self, name: str) -> Any:
        if name in ("host", "__dlpack__") or name.startswith("__array"):
            raise AttributeError(name)
        value = getattr(self.host, name)
        return _counted(value, name) if callable(value) else to_device(value) if name == "T" else value

    def __getitem__(self, key: Any) -> "ndarray":
        return ndarray(self.host[(*key, ...) if isinstance(key, tuple) else (index(key), ...)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[index(key)] = to_host(value)

    def __len__(self) -> int:
        return len(self.host)

    def __deepcopy__(self, memo: dict) -> "ndarray":
        return self.copy()

    def get(self) -> numpy.ndarray:
        count(SYNC)
        return self.host.copy()

    def toDlpack(self) -> Capsule:  # noqa: N802
        return Capsule(self.host)

    def astype(self, dtype: Any, copy: bool = True, **kwargs: Any) -> "ndarray":
        if not copy and self.host.dtype == dtype:
            return self
        return ndarray(self.host.astype(dtype))


def _counted(function: Any, name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*map(to_host, args), **{key: to_host(value) for key, value in kwargs.items()})
        if name in ("item", "tolist"):
            count(SYNC)
        return to_device(result)

    return call


def _define_operators() -> None:
    binary = [prefix + name for name in ("add", "sub", "mul", "truediv", "pow", "matmul") for prefix in ("", "r", "i")]
    for name in (f"__{name}__" for name in (*binary, "neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne")):

        def operate(self: ndarray, *others: Any, name: str = name) -> Any:
            result = _counted(getattr(self.host, name), name)(*others)
            return self if name[2] == "i" and name != "__invert__" else result

        setattr(ndarray, name, operate)
    for name in ("__float__", "__int__", "__bool__", "__index__"):

        def synchronise(self: ndarray, name: str = name) -> Any:
            count(SYNC)
            return getattr(self.host, name)()

        setattr(ndarray, name, synchronise)
    ndarray.__hash__ = object.__hash__


_define_operators()


class Module(ModuleType):
    """The module cupy: NumPy's functions on CuPy's arrays."""

    __version__ = "14.2.0"
    ndarray = ndarray

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # __path__ would make numpy.random of `import cupy.random`
            raise AttributeError(name)
        value = getattr(numpy, name)
        return value if isinstance(value, type) or not callable(value) else _counted(value, name)

    def array(self, data: Any, dtype: Any = None, copy: bool = True) -> ndarray:
        if isinstance(data, ndarray):
            copied = numpy.array(data.host, dtype=dtype, copy=copy)
            return data if copied is data.host else ndarray(copied)
        count(TO_DEVICE)
        return ndarray(numpy.array(data, dtype=dtype))

    def asarray(self, data: Any, dtype: Any = None) -> ndarray:
        return self.array(data, dtype, copy=None)

    def split(self, array: ndarray, ends: Any, axis: int = 0) -> list[ndarray]:
        assert not isinstance(ends, ndarray), "CuPy reads each end from the device"
        return to_device(numpy.split(array.host, ends, axis))

    def save(self, file: Any, array: Any) -> None:
        numpy.save(file, array.get() if isinstance(array, ndarray) else array)

    def get_array_module(self, *arrays: Any) -> ModuleType:
        return self if any(isinstance(array, ndarray) for array in arrays) else numpy

    def from_dlpack(self, capsule: Capsule) -> ndarray:
        return ndarray(capsule.array)


def scatter_add(table: ndarray, rows: Any, values: ndarray) -> None:
    numpy.add.at(table.host, index(rows), values.host)


class Device(contextlib.nullcontext):
    """The only device."""

    def use(self) -> None:
        assert self.enter_result == 0, "the stand-in has one device"


def modules() -> dict[str, ModuleType]:
    """Return cupy, cupyx and those of their parts that thinc uses, by name."""
    cupy, cupyx = Module("cupy"), ModuleType("cupyx")
    cupyx.scatter_add = scatter_add
    generator = numpy.random.RandomState(0)
    cupy.random, cupy.cublas = ModuleType("cupy.random"), ModuleType("cupy.cublas")
    cupy.random.seed, cupy.random.uniform = generator.seed, _counted(generator.uniform, "uniform")
    cupy.RawModule = cupy.RawKernel = cupy.ElementwiseKernel = cupy.ReductionKernel = lambda *args, **kwargs: None
    pool = SimpleNamespace(malloc=None, free_all_blocks=lambda: None)
    cupy.get_default_memory_pool = lambda: pool
    cupy.cuda = SimpleNamespace(
        Device=Device,
        device=SimpleNamespace(Device=Device),
        runtime=SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError),
        MemoryPool=lambda allocator: pool,
        set_allocator=lambda allocator: None,
    )
    return {module.__name__: module for module in (cupy, cupyx, cupy.random, cupy.cublas)}
