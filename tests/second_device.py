"""A second device without hardware: its tensors lie in the CPU's memory, and it behaves as a GPU where that matters.

- It refuses operators whose tensors are on two devices, as CUDA does.
- It notes every point where the host waits for the device, with file and line: reading a number, a copy that blocks,
  an index by a mask, a synchronized event.
- A copy to the device with `non_blocking=True` does not wait if it comes from pinned memory or is small. One to the CPU
  does not wait either; its numbers are there once an event or the device has been synchronized.

It is a PrivateUse1 backend, of which a process can have one, and which stays for good. So tests run on it in a process
of their own: take the fixture `on_second_device`.

    def losses():  # in the child process
        with second_device() as syncs:
            model = Net().to("gpu")
            ...
        return syncs.count("predictor/")

    def test_it(on_second_device):
        assert on_second_device(losses) == 0
"""

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "gpu"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this PyTorch takes a backend written in Python. The oldest do not."""
_ROOT = Path(__file__).parents[1]
_SMALL = 65536
"""Bytes up to which a copy from pageable memory does not wait, as CUDA's documentation has it."""
_READS = {
    "_local_scalar_dense": "reads a number",
    "_linalg_check_errors": "reads an error code",
    "equal": "reads whether tensors are equal",
    "nonzero": "reads how many are not zero",
    "masked_select": "reads how many are selected",
    "bincount": "reads the largest number",
    "unique_dim": "reads how many are unique",
    "_unique": "reads how many are unique",
    "_unique2": "reads how many are unique",
    "repeat_interleave": "reads how many there will be",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_MOVES = {"_to_copy", "copy_", "_copy_from"}


class Syncs(Counter[tuple[str, str]]):
    """How often the host waited, by the place in the checkout ("predictor/sieving.py:56") and the reason."""

    def note(self, why: str) -> None:
        """Count a wait at the innermost place in the checkout that is not this file."""
        self[_place(), why] += 1

    def of(self, *folders: str) -> dict[tuple[str, str], int]:
        """Those at places in these folders. The rest belongs to the training loop, or to PyTorch."""
        return {key: count for key, count in self.items() if key[0].startswith(folders)}

    def count(self, *folders: str) -> int:
        """How many there were in these folders."""
        return sum(self.of(*folders).values())


@contextmanager
def second_device() -> Iterator[Syncs]:
    """Make the second device usable, and count its syncs. Outside, tensors cannot be made on it."""
    _register()
    syncs = Syncs()
    _listening.append(syncs)
    try:
        with _Mode():
            yield syncs
    finally:
        _listening.remove(syncs)


class Child:
    """A process of its own, in which functions run on the second device. It starts at the first call."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of a module returns there. It raises what the function raises."""
        if self._pool is None:
            # Not forked: a process with threads cannot be copied safely.
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start)
        return self._pool.submit(function, *args).result()

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown()


class DeviceTensor(Tensor):
    """A tensor on the second device. `raw` is the tensor in the CPU's memory that holds its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "DeviceTensor":
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        return made

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"DeviceTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what it would be when loaded with map_location="cpu"."""
        _note("copies to the CPU")
        plain = self.raw.detach().requires_grad_(self.requires_grad)
        return (torch.nn.Parameter(plain, self.requires_grad) if _is_parameter(self) else plain).__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Read in C++, below all that could be noted there."""
        _note("reads a number")
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as for a tensor on a GPU."""
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if not any(isinstance(part, list) for part in keys):
            return super().__getitem__(key)
        # PyTorch makes a tensor of a list in C++, on the CPU, and copies it over.
        _note("copies an index over")
        return super().__getitem__(tuple(DeviceTensor(_tensor(k)) if isinstance(k, list) else k for k in keys))


class Event:
    """An event of the second device. Time passes only on the host."""

    def __init__(self, device: Any = None, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self._enable_timing = enable_timing
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """Whether the device has come that far."""
        return True

    def wait(self, stream: Any = None) -> None:
        """Have a stream wait, not the host."""

    def synchronize(self) -> None:
        """Wait for it."""
        _note("waits for an event")

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds to another event."""
        assert self._enable_timing, "an event without enable_timing=True has no time"
        return (end._at - self._at) * 1000


class Stream:
    """A stream of the second device: a name only."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Wait for another stream; the host does not."""

    def wait_event(self, event: Any) -> None:
        """Wait for an event; the host does not."""

    def record_event(self, event: Any = None) -> Event:
        """An event at this point."""
        event = event or Event()
        event.record()
        return event  # type: ignore[no-any-return]

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def synchronize(self) -> None:
        """Wait for all that is queued here."""
        _note("waits for a stream")


class _Mode(TorchDispatchMode):
    """Lets functions that make tensors, and copies from the CPU, reach the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Module(backend_registration._DummyBackendModule if AVAILABLE else object):  # type: ignore[misc]
    """`torch.gpu`, with what PyTorch and other libraries ask of such a module."""

    Event = Event
    Stream = Stream

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        torch.default_generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        _note("waits for the device")

    def current_stream(self, device: Any = None) -> Stream:
        return _current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def set_device(self, device: Any) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 1 << 33, 1 << 33


_current = Stream()
_listening: list[Syncs] = []
_pinned: "set[int]" = set()
_kernels: list[Any] = []
_tensor = torch.tensor
_as_tensor = torch.as_tensor


def _register() -> None:
    """Make the backend, once in this process."""
    if hasattr(torch, NAME):
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # What makes tensors where no mode is active.
    for name, make in (("empty.memory_format", _empty), ("empty_strided", _empty_strided)):
        _kernels.append(torch.library.Library("aten", "IMPL"))
        _kernels[-1].impl(name, make, "PrivateUse1")
    # Parameters stay the same objects when a model is moved, as they do for other devices.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # Both make their tensors in C++ without asking a mode. Signatures of torch.tensor and torch.as_tensor.
    torch.tensor = _made_over(_tensor)
    torch.as_tensor = _made_over(_as_tensor)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _made_over(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, dtype=dtype, **({} if device is None else {"device": device}), **options)
        return data.to(device, dtype) if isinstance(data, Tensor) else make(data, dtype=dtype, **options).to(device)

    return made


def _start() -> None:
    """Prepare the child process as pytest prepares its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    _register()


def _note(why: str) -> None:
    for syncs in _listening:
        syncs.note(why)


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(_ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(_ROOT).as_posix()}:{frame.lineno}"
    return "PyTorch"  # in a thread of the backward pass, say


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the tensors behind, and return tensors on the device where it would."""
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    target = kwargs.get("device")
    to_here = bool(here) if target is None else torch.device(target).type == NAME
    if name in ("pin_memory", "_pin_memory", "is_pinned") and not here:
        return _pin(name, args[0])
    if name == "record_stream":
        return None
    if name in _MOVES:
        to_here = _move(name, args, kwargs, to_here)
    elif here and host:
        _check_devices(func, name, args, host)
    if here:
        _note_reads(name, args)
    if not here and not to_here:
        return func(*args, **kwargs)
    result = func(*_raw(args), **_raw(_on_host(kwargs)))
    result = tree_map(lambda leaf: DeviceTensor(leaf) if isinstance(leaf, Tensor) and to_here else leaf, result)
    if (name in _MOVES and name != "copy_") or not here:
        return result
    # Views share memory with what they are views of, and what is written in place is returned itself.
    return return_and_correct_aliasing(func, args, kwargs, result)


def _raw(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.raw if isinstance(leaf, DeviceTensor) else leaf, value)


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("device") is None:
        return kwargs
    kwargs = {**kwargs, "device": torch.device("cpu")}
    return {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs


def _move(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_here: bool) -> bool:
    """Note where a copy between devices waits. Returns whether its result is on the device."""
    if name == "_to_copy":
        source, blocking = args[0], not kwargs.get("non_blocking")
    else:
        target, source = args[:2]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        to_here = isinstance(target, DeviceTensor)
    from_here = isinstance(source, DeviceTensor)
    if from_here and not to_here and blocking:
        _note("copies to the CPU")
    elif to_here and not from_here and source.dim() | (name == "_to_copy"):
        pageable = source.untyped_storage()._cdata not in _pinned and source.nbytes > _SMALL
        if blocking or pageable:
            _note("copies from the CPU" if blocking else "copies from pageable memory")
    return to_here


def _check_devices(func: Any, name: str, args: tuple[Any, ...], host: list[Tensor]) -> None:
    """Refuse what CUDA refuses: tensors of the CPU, other than single numbers in elementwise operators."""
    if name in _INDEXING and isinstance(args[0], DeviceTensor):
        indices = [index for index in args[1] or () if isinstance(index, Tensor)]
        for _ in (index for index in indices if not isinstance(index, DeviceTensor)):
            _note("copies an index over")
        host = [value for value in args[2:3] if isinstance(value, Tensor) and not isinstance(value, DeviceTensor)]
    elementwise = torch.Tag.pointwise in func.tags or name in _INDEXING or name.startswith(("_foreach", "_fused"))
    refused = [tensor for tensor in host if tensor.dim() or not (elementwise or name == "fill_")]
    if refused:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! ({func})"
        )


def _note_reads(name: str, args: tuple[Any, ...]) -> None:
    if name in _READS:
        _note(_READS[name])
    if name in _INDEXING:
        indices = [index for index in args[1] or () if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _note("reads how many a mask selects")


def _pin(name: str, tensor: Tensor) -> Any:
    number = tensor.untyped_storage()._cdata
    if name == "is_pinned":
        return number in _pinned
    copy = tensor.clone()
    _pinned.add(copy.untyped_storage()._cdata)
    return copy
