"""Test the backend `triton` without a GPU: Triton's interpreter runs the kernels' source tile by tile on CPU tensors.

Triton decides at import whether it interprets, and many modules import it (for example torch's compiler). Therefore one
test here starts pytest again with TRITON_INTERPRET=1, on the tests of all backends and on the rest of this file.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptd_kernels import available_backends, explain_backend, prefix_attention
from ptd_kernels.prefix_attention.fused.tile_table import Tile
from ptd_kernels.prefix_attention.segments import EAGER, OWN_TRITON, OWN_TRITON_BIASED, Rule
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("PTD_TEST_DEVICE", "cpu")
HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")
runs = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU or Triton's interpreter")


@needs_triton
@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "-k", "triton",
         str(HERE / "test_prefix_attention.py"), str(HERE / "test_shared_keys.py"), __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PTD_TEST_DEVICE": "cpu"}, cwd=HERE.parent.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_triton_is_never_chosen_unasked() -> None:
    assert available_backends()[:4] == ("decode", "joined", "merge", "reference")
    assert explain_backend()[0] not in ("triton", "decode")


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU it is chosen")
def test_decoding_on_a_cpu_is_not_interpreted() -> None:
    with pytest.raises(ValueError, match=r"'decode' cannot do this: .*needs an NVIDIA GPU"):
        explain_backend(backend="decode")


@interpreted
@pytest.mark.parametrize(
    ("says", "options"),
    [("no mask", {"masked": True}), ("not in fp64", {"dtype": torch.float64})],
)
def test_what_triton_refuses(says: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"'triton' cannot do this: .*{says}"):
        explain_backend(backend="triton", **options)


@interpreted
def test_what_triton_accepts() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for options in ({}, {"packed": True}, {"softcap": 2.0}, {"head_dim": 192, "value_head_dim": 128}):
            assert explain_backend(backend="triton", dtype=dtype, **options)[0] == "triton"


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="for a machine without a GPU, not interpreted")
@needs_triton
def test_triton_refuses_tensors_off_the_gpu() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        explain_backend(backend="triton")


def leaves(S: int, P: int, D: int, E: int, dtype: torch.dtype, B: int = 1, Hq: int = 2, Hkv: int = 1) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(B, S, Hq, D), (B, S, Hkv, D), (B, S, Hkv, E), (P, Hkv, D), (P, Hkv, E)]
    made = [torch.randn(shape, generator=generator, device=DEVICE).to(dtype).transpose(-3, -2) for shape in shapes]
    return [x.requires_grad_() for x in made]


def out_and_gradients(x: list[Tensor], **options: Any) -> list[Tensor]:
    out = prefix_attention(*x, **options)
    dout = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE).to(out.dtype)
    return [out, *torch.autograd.grad(out, x, dout)]


def assert_close(actual: list[Tensor], exact: list[Tensor], rtol: float) -> None:
    for a, b in zip(actual, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm().item() <= rtol * b.norm().item()


@runs
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("D", "E"), [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_head_sizes_of_triton(D: int, E: int, dtype: torch.dtype, rtol: float) -> None:
    x = leaves(20, 18, D, E, dtype)
    assert_close(out_and_gradients(x, backend="triton"), out_and_gradients(x, backend="reference"), rtol)


@runs
@pytest.mark.parametrize("lengths", [[150], [60, 0, 1, 24, 65]], ids=["one", "packed"])
@pytest.mark.parametrize("options", [{}, {"window": 50, "softcap": 3.0}], ids=["causal", "window, softcap"])
def test_many_tiles_of_triton(lengths: list[int], options: dict[str, Any]) -> None:
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    options = {**options, "cu_seqlens": cu_seqlens}
    x = leaves(150, 70, 16, 16, torch.float32)
    exact = out_and_gradients(x, backend="reference", **options)
    assert_close(out_and_gradients(x, backend="triton", **options), exact, 1e-5)


@runs
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("options", [{}, {"window": 150, "softcap": 3.0}], ids=["causal", "window, softcap"])
@pytest.mark.parametrize(("B", "P", "T"), [(1, 70, 200), (1, 200, 30), (3, 0, 200), (1, 250, 0)])
def test_split_keys_of_triton(S: int, options: dict[str, Any], B: int, P: int, T: int) -> None:
    x = leaves(S, P, 16, 16, torch.float32, B=B)
    x[1:3] = [y.detach().requires_grad_() for y in leaves(T, 0, 16, 16, torch.float32, B=B)[1:3]]
    assert_close(
        out_and_gradients(x, backend="triton", **options), out_and_gradients(x, backend="reference", **options), 1e-5
    )


DECODING: dict[str, dict[str, Any]] = {
    "causal": {},
    "window, softcap": {"window": 40, "softcap": 2.0},
    "padded": {"causal": False, "mask": (torch.arange(300) >= torch.tensor([[0], [290]]))[:, None, None]},
    "mask of a head": {"causal": False, "mask": torch.arange(4 * 300).view(1, 4, 1, 300) % 3 > 1},
    "nothing visible": {"causal": False, "mask": torch.zeros(1, 1, 1, 300, dtype=torch.bool)},
    "bias": {"bias": torch.linspace(-3, 3, 300).expand(2, 4, 1, 300)},
    "mask, bias": {
        "causal": False,
        "mask": (torch.arange(300) < 200)[None, None, None],
        "bias": torch.linspace(-3, 3, 300).expand(1, 1, 1, 300),
    },
    "several prefixes": {"prefix_index": torch.tensor([1, 0])},
}


@runs
@pytest.mark.parametrize("P", [0, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECODING)
def test_decoding_equals_the_reference(name: str, dtype: torch.dtype, P: int) -> None:
    options = {key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in DECODING[name].items()}
    q, _, _, *prefix = leaves(1, P, 20, 12, torch.float32, B=2, Hq=4, Hkv=2)
    k, v = leaves(300, P, 20, 12, dtype, B=2, Hkv=2)[1:3]
    if "prefix_index" in options:
        prefix = [torch.stack([x, 2 * x]) for x in prefix]
    mask = options.get("mask")
    if mask is not None:
        options["mask"] = mask.expand(-1, -1, 1, -1)
    with torch.no_grad():
        found = prefix_attention(
            q.to(dtype), k, v, *prefix, backend="triton" if DEVICE == "cpu" else "decode", **options
        )
        exact = prefix_attention(q.to(dtype), k, v, *prefix, backend="reference", **options)
    assert_close([found], [exact], 1e-5 if dtype == torch.float32 else 1e-2)
    if P == 0 and name == "nothing visible":
        assert not found.any()


@runs
@pytest.mark.parametrize("T", [20, 300], ids=["one split", "several splits"])
def test_the_decode_operator_is_well_behaved(T: int) -> None:
    from ptd_kernels.prefix_attention.fused.decode_operator import prefix_attention_decode

    q, _, _, *prefix = (x.detach() for x in leaves(1, 3, 8, 8, torch.float32))
    k, v = (x.detach() for x in leaves(T, 3, 8, 8, torch.float32)[1:3])
    mask = torch.ones(1, 1, 1, T, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(prefix_attention_decode, (q, k, v, *prefix, mask, None, None, 0.3, False, None, None))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill the memory that torch leaves uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("S", [1, 33])
@pytest.mark.parametrize("P", [0, 21])
def test_triton_writes_all_of_its_results(S: int, P: int) -> None:
    x = leaves(S, P, 20, 12, torch.float32, B=2)
    for a, b in zip(out_and_gradients(x, backend="triton"), out_and_gradients(x, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


CALLS: dict[str, dict[str, Any]] = {
    "causal": {},
    "no prefix": {"prefix": False},
    "bidirectional": {"causal": False},
    "decode": {"rows": 1},
    "packed, window, softcap": {"cu_seqlens": torch.tensor([0, 5, 9]).int(), "window": 3, "softcap": 2.0},
    "bias": {"bias": torch.randn(1, 2, 9, 9)},
    "packed, several prefixes": {
        "cu_seqlens": torch.tensor([0, 5, 9]).int(),
        "prefix_index": torch.tensor([1, 0]).int(),
        "prefix_bounds": torch.tensor([0, 1, 3]).int(),
    },
}


def operator_arguments(name: str) -> tuple[Any, ...]:
    """Return the arguments of a call of the operator ``ptd_kernels::prefix_attention``."""
    call = CALLS[name]
    x = leaves(call.get("rows", 9), 3, 8, 8, torch.float32)
    prefix = x[3:] if call.get("prefix", True) else [None, None]
    rest = call.get("causal", True), call.get("window"), call.get("softcap")
    tensors = (call.get(name) for name in ("bias", "cu_seqlens", "prefix_index", "prefix_bounds"))
    tensors = (None if y is None else y.to(DEVICE) for y in tensors)
    return (*x[:3], *prefix, *tensors, 0.3, *rest)


@runs
@pytest.mark.parametrize("name", CALLS)
def test_triton_operator_is_well_behaved(name: str) -> None:
    from ptd_kernels.prefix_attention.fused.operator import prefix_attention_backward, prefix_attention_forward

    arguments = operator_arguments(name)
    torch.library.opcheck(prefix_attention_forward, arguments)
    out, lse = prefix_attention_forward(*arguments)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    saved = (torch.ones_like(out), out.detach(), lse.detach())
    torch.library.opcheck(prefix_attention_backward, (*saved, *plain, True, False, True))


@runs
@pytest.mark.parametrize("index", [None, torch.tensor([1, 0])], ids=["shared", "several"])
def test_triton_under_torch_compile(index: Tensor | None) -> None:
    def layer(*x: Tensor) -> Tensor:
        return prefix_attention(*x, backend="triton", window=7, prefix_index=index).square()

    x = leaves(9, 3, 8, 8, torch.float32, B=2)
    if index is not None:
        index = index.to(DEVICE)
        x[3:] = [torch.stack([y, 2 * y]).detach().requires_grad_() for y in x[3:]]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(*x).sum(), x) for f in (compiled, layer)), strict=True):
        torch.testing.assert_close(a, b)


@runs
@pytest.mark.parametrize(
    ("wanted", "launched"),
    [
        ([3, 4], ["prefix_gradient"]),
        ([0], ["query_gradient"]),
        ([1], ["key_gradient"]),
        ([0, 4], ["query_gradient", "prefix_gradient"]),
    ],
)
def test_triton_computes_only_the_gradients_needed(
    wanted: list[int], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptd_kernels.prefix_attention.fused import launch

    x = [y.detach().requires_grad_(i in wanted) for i, y in enumerate(leaves(9, 3, 8, 8, torch.float32))]
    out = prefix_attention(*x, backend="triton")
    seen, with_tile = [], launch.with_tile

    def record(name: str, *rest: Any) -> Any:
        seen.append(name)
        return with_tile(name, *rest)

    monkeypatch.setattr(launch, "with_tile", record)
    out.sum().backward()
    assert seen == launched
    assert [i for i, y in enumerate(x) if y.grad is not None] == wanted


NARROW, WIDE = Tile(32, 16, 4, 1), Tile(64, 32, 4, 1)


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


FAILURES = {
    "resources": out_of_resources,
    "torch's memory": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "the launcher's memory": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
}


@runs
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_triton_goes_on_with_the_next_tile(
    failure: str, timed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the wide tile of each kernel cannot be launched, the next tile runs, whether or not tiles are timed."""
    from ptd_kernels.prefix_attention.fused import launch
    from ptd_kernels.prefix_attention.fused.tuning import Choices

    run_kernel, refused = launch.run_kernel, []

    def run(kernel: Any, grid: tuple[int, ...], common: dict[str, Any], tile: Tile) -> None:
        if tile == WIDE:
            refused.append(kernel)
            raise FAILURES[failure]()
        run_kernel(kernel, grid, common, tile)

    monkeypatch.setattr(launch, "run_kernel", run)
    monkeypatch.setattr(launch, "tiles_for", lambda *_: (WIDE, NARROW))
    monkeypatch.setattr(launch, "allowed", lambda: timed)
    monkeypatch.setattr(launch, "_choices", lambda: Choices(tmp_path / "tiles.json"))
    if DEVICE == "cpu":  # nothing is timed on a CPU
        monkeypatch.setattr("triton.testing.do_bench", lambda work, **options: (work(), 1.0)[1])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = leaves(20, 18, 16, 16, torch.float32)
    assert_close(out_and_gradients(x, backend="triton"), out_and_gradients(x, backend="reference"), 1e-5)
    assert len(refused) == 4
    chosen = (tmp_path / "tiles.json").read_text() if timed else ""
    assert chosen.count(str(WIDE.rows)) == 0


@runs
@pytest.mark.parametrize("name", ["packed window", "chunk", "mask", "bias"])
def test_triton_for_one_segment_equals_plain_torch(name: str) -> None:
    """With an output and a log-sum-exp of more keys, backward gives this segment's share, as plain torch's does."""
    q, k, v, *_ = (x.detach() for x in leaves(40, 1, 16, 16, torch.float32))
    rule = Rule(0.3, softcap=2.0)
    kernel, same = OWN_TRITON, None
    if name == "packed window":
        bounds = torch.tensor([0, 25, 40], device=DEVICE, dtype=torch.int32)
        number = torch.searchsorted(bounds, torch.arange(40, device=DEVICE), right=True)
        rule = rule._replace(offset=0, window=9)
        rule, same = rule._replace(cu_seqlens=bounds, max_seqlen=25), rule._replace(sequences=(number, number))
    if name == "chunk":
        q, rule = q[:, :, 23:], rule._replace(offset=23)
    if name == "mask":
        kernel, shown = OWN_TRITON_BIASED, torch.rand(1, 1, 40, 40, device=DEVICE) < 0.05
        rule = rule._replace(mask=shown)
    if name == "bias":
        kernel, rule = OWN_TRITON_BIASED, rule._replace(offset=0, bias=torch.randn(1, 2, 40, 40, device=DEVICE))
    want, got = EAGER.forward(q, k, v, same or rule), kernel.forward(q, k, v, rule)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    lse = torch.logaddexp(want[1], torch.ones_like(want[1]))  # as if there were more keys
    dout = torch.ones_like(want[0])
    got = kernel.backward(dout, q, k, v, 0.7 * want[0], lse, rule)
    for a, b in zip(got, EAGER.backward(dout, q, k, v, 0.7 * want[0], lse, same or rule), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
