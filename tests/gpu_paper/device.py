"""Emulate an NVIDIA GPU on a machine without one: real code runs on real tensors on ``cuda:0``.

The GPU's memory is host memory (``device.cpp``, built once with the machine's C++ compiler) and its kernels are the
CPU's, so every number is real. The emulation refuses what a GPU would refuse: an operation on tensors of two devices,
the state of a fused optimizer on the host. `Seen` counts what a GPU would do: the operations launched, and those that
make the host wait. `shapes_only` leaves the numbers out: models of any size then run in seconds and in little memory.

Load this module before torch, which looks for CUDA only once: ``python -m pytest -p tests.gpu_paper.device …``.
On a machine with a real GPU, nothing is emulated, and `Seen` counts the same operations there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME, CAPABILITY, MEMORY = "emulated NVIDIA H200", (9, 0), 141 << 30
SOURCE = Path(__file__).with_name("device.cpp")
BUILT = Path(__file__).parents[2] / ".pytest_cache" / "gpu_paper"


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _has_cuda() -> bool:
    return any((_torch_folder() / "lib").glob("libtorch_cuda*"))


def _built(compiler: str) -> Path:
    """Return the library of ``device.cpp`` for this torch; build it if it does not exist."""
    folder = _torch_folder()
    version = (folder / "version.py").read_text(encoding="utf-8")
    key = hashlib.sha256((SOURCE.read_text(encoding="utf-8") + version + str(folder)).encode()).hexdigest()[:16]
    library = BUILT / f"{key}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}.so")
        include = folder / "include"
        command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{include}"]
        command += [f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True)
        made.rename(library)
    return library


COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
EMULATED = not _has_cuda() and COMPILER is not None
if EMULATED:
    assert COMPILER is not None
    assert "torch" not in sys.modules, "load this before torch, which looks for its CUDA once"
    os.environ |= {"TRITON_INTERPRET": "1", "PTD_KERNELS_INTERPRET": "1", "PTD_KERNELS_TUNE": "0"}
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_built(COMPILER)))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from tests.gpu_paper.kernels import KERNELS, SHAPES  # noqa: E402

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.bincount,
    aten._unique2, aten.unique_consecutive, aten.unique_dim,
}  # fmt: skip
"""Operations whose result is a number on the host, or determines the shape of a tensor."""


class Seen:
    """Counts, while ``watched``, the operations that the GPU would launch and those that the host would wait for.

    ``doing``: the name of the current work. ``launched`` counts operations by ``doing`` and by name; ``waited`` lists
    for each wait the ``doing``, the operation, and the files and lines that called it.
    """

    def __init__(self) -> None:
        self.doing = ""
        self.launched: Counter[tuple[str, str]] = Counter()
        self.waited: list[tuple[str, str, str]] = []

    def launches(self, doing: str | None = None) -> int:
        """Return the number of operations launched, in total or during ``doing``."""
        return sum(count for (when, _), count in self.launched.items() if doing in (None, when))

    def launch(self, name: str) -> None:
        """Count an operation."""
        self.launched[self.doing, name] += 1

    def ran(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Do nothing; a subclass may inspect the tensors of an operation that the emulated GPU has run."""

    def ran_triton(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """Do nothing; a subclass may inspect the arguments of a Triton kernel that the emulated GPU has launched."""

    def wait(self, name: str) -> None:
        """Record that the host waits."""
        own = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        own = [frame for frame in own if frame.filename != __file__]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in own[:-5:-1])
        self.waited.append((self.doing, name, where))


_watching: list[Seen] = []


@contextlib.contextmanager
def watched(seen: Seen | None = None) -> Iterator[Seen]:
    """Yield ``seen`` (None: a new `Seen`), which counts the operations inside this context."""
    seen = Seen() if seen is None else seen
    with contextlib.nullcontext() if EMULATED else Dispatched(seen):
        if EMULATED:
            _watching.append(seen)
        try:
            yield seen
        finally:
            _watching[:] = [other for other in _watching if other is not seen]


def _launches(name: str) -> None:
    for seen in _watching:
        seen.launch(name)


def _ran(op: Any, args: Any, kwargs: Any, out: Any) -> None:
    for seen in _watching:
        seen.ran(op, args, kwargs, out)


def _ran_triton(kernel: Any, arguments: dict[str, Any]) -> None:
    for seen in _watching:
        seen.ran_triton(kernel, arguments)


def _waits(name: str) -> None:
    for seen in _watching:
        seen.wait(name)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Compute no number on the emulated GPU inside this context: only shapes, strides and dtypes are right.

    Operations launch and wait as they would with numbers. Memory is allocated but never touched, so it takes address
    space only. Copies from and to the host still copy, and the operations for which the host waits still compute, on
    arbitrary numbers: a result of them means nothing. Raises `RuntimeError` if nothing is emulated.
    """
    if not EMULATED:
        raise RuntimeError("shapes_only needs the emulated GPU: a CPU build of torch, and a C++ compiler")
    _without_numbers.append(True)
    try:
        yield
    finally:
        _without_numbers.pop()


_without_numbers: list[bool] = []


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """On a real GPU, make torch itself raise if the host waits inside this context."""
    if EMULATED:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    kept, _watching[:] = list(_watching), []
    try:
        yield
    finally:
        _watching[:] = kept


class Dispatched(TorchDispatchMode):
    """Counts for `Seen` on a real GPU, where only torch's dispatcher can observe the operations."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        out = func(*args, **kwargs)
        tensors = list(_tensors((args, kwargs, out)))
        devices = {tensor.device.type for tensor in tensors}
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if "cuda" not in devices or view or func.namespace == "prim" or "empty" in str(packet):
            return out
        self.seen.launch(str(packet))
        if _reads(packet, args, kwargs):
            self.seen.wait(str(packet))
        if packet in (aten.copy_, aten._to_copy) and len(devices) == 2:
            on_host = next(tensor for tensor in (out, *args) if tensor.device.type == "cpu")
            if not (on_host.is_pinned() and True in (kwargs.get("non_blocking"), *args[2:])):
                self.seen.wait("copy between host and GPU")
        return out


# ---- an operation


HOST = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_host: Any = torch.ops.gpu_paper.on_host.default if EMULATED else None
TWO_DEVICES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten.copy_}
"""Operations that accept tensors on the host, as an index or for a copy."""


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an operation of the GPU with the CPU's kernel on the same memory."""
    packet = op.overloadpacket
    tensors = list(_tensors((args, kwargs)))
    _check_devices(op, tensors)
    if _reads(packet, args, kwargs):
        _waits(str(packet))
    _launches(str(packet))
    if _without_numbers and not _reads(packet, args, kwargs):
        returned = _shapes(op, args, kwargs)
    else:
        returned = _numbers(op, args, kwargs)
    _ran(op, args, kwargs, returned)
    return returned


def _numbers(op: Any, args: Any, kwargs: Any) -> Any:
    """Return the operation's results, computed by the CPU."""
    packet = op.overloadpacket
    host_args, host_kwargs = _numbers_as_tensors(op, _on_host(args), _on_host(kwargs))
    grown = {name for name in _written(op) if isinstance(kwargs.get(name), Tensor) and kwargs[name].numel() == 0}
    for name in grown:  # an output that the operation itself resizes
        host_kwargs[name] = torch.empty(0, dtype=kwargs[name].dtype)
    if isinstance(host_kwargs.get("device"), torch.device):
        host_kwargs["device"] = torch.device("cpu")
    with _drawing_from(kwargs.get("generator")) as generator:
        if generator is not None:
            host_kwargs["generator"] = generator
        special = KERNELS.get(packet)
        out = special(*host_args, **host_kwargs) if special else op.redispatch(HOST, *host_args, **host_kwargs)
    for name in grown:
        kwargs[name].resize_(host_kwargs[name].shape)
        _host(kwargs[name]).copy_(host_kwargs[name])
    return _returned(op, _on_device(out), args, kwargs)


def _shapes(op: Any, args: Any, kwargs: Any) -> Any:
    """Return results of the right shapes in memory that nobody has written."""

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, list | tuple):
            return type(value)(described(each) for each in value)
        return torch.device("meta") if isinstance(value, torch.device) else value

    def allocated(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return type(value)(map(allocated, value)) if isinstance(value, list | tuple) else value

    given = {name: described(value) for name, value in kwargs.items() if name != "generator"}
    out = SHAPES.get(op.overloadpacket, op)(*described(args), **given)
    for name in _written(op):  # an output that the operation itself resizes
        if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape != given[name].shape:
            kwargs[name].resize_(given[name].shape)
    return _returned(op, allocated(out), args, kwargs)


@contextlib.contextmanager
def _drawing_from(given: torch.Generator | None) -> Iterator[torch.Generator | None]:
    """Yield a host generator with the state of the GPU's generator; afterwards, copy its new state back."""
    if given is None:
        yield None
        return
    if given.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{given.device.type}'")
    generator = torch.Generator()
    generator.set_state(given.get_state())
    yield generator
    given.set_state(generator.get_state())


def _on_host(value: Any) -> Any:
    """Return the value with all its tensors, nested ones too, as host tensors on the same memory."""
    if isinstance(value, Tensor):
        return _host(value) if value.is_cuda else value
    if isinstance(value, list | tuple):
        return type(value)(_on_host(each) for each in value)
    return {name: _on_host(each) for name, each in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _numbers_as_tensors(op: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Put numbers into tensors again where C++ had done so: they arrive here as Python numbers."""
    if not any(isinstance(value, int | float) for value in (*args, *kwargs.values())):
        return list(args), kwargs
    wide = any(value.dtype == torch.float64 for value in _tensors((args, kwargs)))

    def convert(value: Any, wanted: Any) -> Any:
        if not isinstance(value, bool | int | float) or str(wanted.type) not in ("Tensor", "Optional[Tensor]"):
            return value
        return torch.tensor(value, dtype=torch.float64 if wide and isinstance(value, float) else None)

    wanted = {arg.name: arg for arg in op._schema.arguments}
    positional = [convert(value, arg) for value, arg in zip(args, op._schema.arguments, strict=False)]
    return positional, {name: convert(value, wanted[name]) for name, value in kwargs.items()}


def _on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.ops.gpu_paper.on_device.default(value)
    return type(value)(_on_device(each) for each in value) if isinstance(value, list | tuple) else value


@functools.cache
def _written(op: Any) -> list[str]:
    return [arg.name for arg in op._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write]


def _returned(op: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """Return the operation's results: the tensors that it wrote to, and the new tensors in ``out``."""
    schema = op._schema
    many = isinstance(out, tuple)
    found = []
    for value, returns in zip(out if many else [out], schema.returns, strict=False):
        alias = returns.alias_info
        if alias is not None and alias.is_write:
            for place, arg in enumerate(schema.arguments):
                if arg.alias_info is not None and arg.alias_info.before_set == alias.before_set:
                    value = kwargs[arg.name] if arg.name in kwargs else args[place]
        found.append(value)
    return tuple(found) if many else found[0] if found else None


def _check_devices(op: Any, tensors: list[Tensor]) -> None:
    """Raise the error that a GPU raises if some of the tensors are on the host."""
    if op.overloadpacket in TWO_DEVICES or {tensor.device.type for tensor in tensors} == {"cuda"}:
        return
    numbers = torch.Tag.pointwise in op.tags or op.overloadpacket in TAKES_NUMBERS
    for tensor in tensors:
        if tensor.device.type != "cuda" and (tensor.dim() or not numbers):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"{tensor.device}! ({op}, {tuple(tensor.shape)})"
            )


TAKES_NUMBERS = {aten.fill_, aten.fill, aten.masked_fill, aten.masked_fill_, aten._foreach_mul_, aten._foreach_mul,
                 aten._foreach_add_, aten._foreach_add, aten._foreach_div_, aten._foreach_div}  # fmt: skip
"""Operations, in addition to the pointwise ones, that accept a number as a tensor on the host."""


def _reads(packet: Any, args: Any, kwargs: Any) -> bool:
    """Return whether the host waits for the operation."""
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        indices = [index for index in args[1] if index is not None]
        fills = packet is not aten.index and args[2].numel() == 1  # then a mask is not converted to indices
        masked = any(index.dtype == torch.bool for index in indices) and not fills
        return masked or any(index.device.type == "cpu" for index in indices)
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet is aten._grouped_mm:  # has a kernel for bf16; otherwise the products run one by one
        return bool(args[0].dtype != torch.bfloat16)
    return packet in WAITS


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Run ``copy_``: the host waits, except within the GPU, or with pinned memory and ``non_blocking``."""
    if to.device != source.device:
        on_host = to if to.device.type == "cpu" else source
        if not (non_blocking and on_host.is_pinned()):
            _waits("copy between host and GPU")
    _launches("aten.copy_")
    if not _without_numbers or to.device != source.device:
        _on_host(to).copy_(_on_host(source))
    _ran(aten.copy_.default, (to, source, non_blocking), {}, to)
    return to


# ---- torch.cuda


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Stream:
    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    wait_event = wait_stream

    def synchronize(self) -> None:
        _waits("a stream")


class _Device(contextlib.nullcontext):  # type: ignore[type-arg]
    def __init__(self, device: Any) -> None:
        super().__init__()
        self.idx = 0


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _emulate() -> None:
    with contextlib.suppress(ImportError):  # later it would look for its CUDA library; its Python code runs anywhere
        import bitsandbytes  # noqa: F401
    properties = SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=132,
        uuid="GPU-emulated", warp_size=32, shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536,
    )  # fmt: skip
    stream = _Stream()
    put: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": _nothing,
        "init": _nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _nothing,
        "device": _Device,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: _waits("synchronize"),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": _nothing,
        "empty_cache": _nothing,
        "manual_seed": _nothing,
        "manual_seed_all": _nothing,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": list,
    }
    for name, value in put.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    torch.backends.cudnn.is_available = lambda: True
    torch.backends.cudnn.is_acceptable = lambda tensor: False  # an LSTM's cells run one by one
    everything, own = (torch.library.Library(namespace, "IMPL") for namespace in ("_", "aten"))
    everything.fallback(_fallback, "CUDA")
    own.impl("copy_", _copy, "CUDA")
    warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
    for name in torch._C._dispatch_get_all_op_names():  # torch would decompose them, but on a GPU they are one kernel
        if name.startswith("aten::_foreach_") or name in ("aten::_grouped_mm", "aten::silu_backward"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(aten, packet), overload or "default")
            own.impl(name.removeprefix("aten::"), functools.partial(_fallback, op), "CUDA")
    _libraries.extend((everything, own))
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import GridExecutor

        interpret = GridExecutor.__call__

        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            _launches(f"triton.{self.fn.__name__}")
            if not _without_numbers:
                with _unseen():  # the interpreter's own copies
                    interpret(self, *args, **kwargs)
            own = {name: value for name, value in kwargs.items() if name in self.arg_names}
            _ran_triton(self.fn, inspect.getcallargs(self.fn, *args, **own))

        GridExecutor.__call__ = launch


_libraries: list[torch.library.Library] = []
if EMULATED:
    _emulate()

NO_GPU = None
"""The reason why no GPU exists, not even an emulated one; None if one exists."""
if not torch.cuda.is_available():
    NO_GPU = "there is no GPU, and no C++ compiler to build the emulated one"
    if _has_cuda():
        NO_GPU = "torch is built for CUDA but sees no GPU, and the emulated one takes torch's build for CPUs"
