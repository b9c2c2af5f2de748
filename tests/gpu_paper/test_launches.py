"""A layer, and the attention operator alone, launch no more GPU operations than the bounds in two tables.

A layer's share is half of the difference between what a model of four layers launches and what a model of two layers
launches. The operator alone is counted at the sizes of large models, on tensors without data: if a library has no
kernel for a call, plain torch computes the call in slices, and the number of slices depends on the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_backbone
from ptd_kernels import prefix_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from ptd.backbone import load_model
from ptd.config import BackboneConfig
from ptd.engine.forward import Forward
from ptd.inject import Attachment, check_supported
from ptd.readouts import Ask
from ptd.types import Batch, PrefixKV
from tests.gpu_paper.device import EMULATED, Dispatched, Seen, shapes_only, watched

GPU = torch.device("cuda", 0)
LENGTHS = (5, 7)


@pytest.fixture(scope="module")
def of_layers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return a function that saves a backbone of a family with the given number of layers."""
    folder = tmp_path_factory.mktemp("layers")

    def save(family: str, layers: int) -> Path:
        path = folder / f"{family}-{layers}"
        return path if path.exists() else save_backbone(path, family, num_hidden_layers=layers)

    return save


def packed() -> Batch:
    """Return a batch of two concatenated sequences."""
    size = sum(LENGTHS)
    ids = torch.arange(size)[None] % 40 + 10
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    starts = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32)
    return Batch(ids, ids.clone(), positions, starts, max(LENGTHS), size, size, torch.tensor(LENGTHS), (0, 1))


def prefix_of(attachment: Attachment, count: int = 4) -> PrefixKV:
    drawn = torch.Generator().manual_seed(0)
    keys, values = (
        tuple(
            torch.randn(count, layer.kv_heads, size, generator=drawn).to(GPU).requires_grad_()
            for layer in attachment.shape.layers
            for size in [getattr(layer, name)]
        )
        for name in ("key_dim", "value_dim")
    )
    return PrefixKV(keys, values)


def training_step(model: Any, numbers: AbstractContextManager[None] | None = None) -> Seen:
    """Count the operations of forward and backward of a packed micro-batch, run inside the context ``numbers``."""
    attachment = Attachment(model)
    attachment.set(prefix_of(attachment))
    run, batch = Forward(attachment, GPU), packed()
    with watched() as seen, numbers or nullcontext():
        seen.doing = "forward"
        loss = run(batch, Ask(torch.arange(4), torch.arange(4))).sum()
        seen.doing = "backward"
        loss.backward()
    attachment.remove()
    return seen


def second_token(model: Any, padded: bool) -> Seen:
    """Count the operations of the second token that is generated after two prompts."""
    ids = torch.ones(2, 5, dtype=torch.long, device=GPU)
    mask = torch.ones(2, 7, dtype=torch.long, device=GPU)
    mask[0, 0] = not padded
    cache = DynamicCache(config=model.config)
    attachment = Attachment(model)
    attachment.set(prefix_of(attachment))
    with watched() as seen, torch.no_grad():
        for doing, tokens, upto in (("prompt", ids, 5), ("first", ids[:, :1], 6), ("token", ids[:, :1], 7)):
            seen.doing = doing
            model(input_ids=tokens, attention_mask=mask[:, :upto], past_key_values=cache, use_cache=True)
    return seen


LAYER: dict[tuple[str, str], tuple[int, int, int, int]] = {
    ("llama", "float32"): (88, 106, 77, 79),
    ("llama", "bfloat16"): (59, 91, 62, 77),
    ("gemma2", "float32"): (114, 142, 103, 105),
    ("gemma2", "bfloat16"): (135, 163, 124, 126),
    ("gpt2", "float32"): (71, 65, 61, 63),
    ("gpt2", "bfloat16"): (40, 47, 42, 58),
}
"""Bounds for one layer with a prefix: forward and backward of a packed training step, one generated token, and one
generated token after prompts of different lengths. In float32 (and with Gemma's softcap), attention is plain torch."""


@pytest.mark.parametrize(("family", "dtype"), LAYER)
def test_a_layer_launches_no_more(of_layers: Callable[[str, int], Path], family: str, dtype: str) -> None:
    def count(layers: int) -> list[int]:
        config = BackboneConfig(path=str(of_layers(family, layers)), dtype=dtype)
        load = lambda: load_model(config, device=GPU, check=check_supported)  # noqa: E731
        step = training_step(load())
        tokens = [second_token(load(), padded).launches("token") for padded in (False, True)]
        return [step.launches("forward"), step.launches("backward"), *tokens]

    found = tuple((many - few) / 2 for few, many in zip(count(2), count(4), strict=True))
    share = 1 if EMULATED else 1.25  # the dispatcher also sees operations that only decompose others
    assert all(one <= share * most for one, most in zip(found, LAYER[family, dtype], strict=True)), found


@pytest.mark.skipif(not EMULATED, reason="nothing is emulated")
@pytest.mark.parametrize(("family", "dtype"), LAYER)
def test_without_numbers_the_same_is_launched(of_layers: Callable[[str, int], Path], family: str, dtype: str) -> None:
    config = BackboneConfig(path=str(of_layers(family, 2)), dtype=dtype)
    model = load_model(config, device=GPU, check=check_supported)
    with_numbers, without = training_step(model), training_step(model, shapes_only())
    assert without.launched == with_numbers.launched
    assert without.waited == with_numbers.waited == []


OPERATOR: dict[str, tuple[tuple[int, ...], str, tuple[int, int]]] = {
    "7B, packed 4096, P 32": ((1, 4096, 4096, 32, 32, 128, 32), "packed", (5, 6)),
    "7B, packed 4096, P 512": ((1, 4096, 4096, 32, 32, 128, 512), "packed", (5, 8)),
    "7B, packed 32768, P 8192": ((1, 32768, 32768, 32, 32, 128, 8192), "packed", (5, 7)),
    "8B, 8 heads of keys, packed 4096, P 32": ((1, 4096, 4096, 32, 8, 128, 32), "packed", (5, 6)),
    "9B with softcap, packed 4096, P 32": ((1, 4096, 4096, 16, 8, 256, 32), "packed softcap", (5, 8)),
    "T5 base, encoder 16 × 512, P 32": ((16, 512, 512, 12, 12, 64, 32), "bias mask", (15, 15)),
    "BART large, cross 16 × 128 over 512, P 32": ((16, 128, 512, 16, 16, 64, 32), "mask", (14, 14)),
    "7B, prompts 16 × 1024, padded, P 32": ((16, 1024, 1024, 32, 32, 128, 32), "mask", (14, 14)),
    "7B, token 16 × 1 over 1024, padded, P 32": ((16, 1, 1024, 32, 32, 128, 32), "mask", (14, 13)),
    "7B, token over 4096, P 32": ((1, 1, 4096, 32, 32, 128, 32), "", (23, 5)),
    "8B, token over 4096, P 32": ((1, 1, 4096, 32, 8, 128, 32), "", (23, 6)),
}
"""Sizes B, S, T, query heads, key heads, D, P; further options; bounds for forward and for backward, in bf16, with
gradients."""


def operator(sizes: tuple[int, ...], kind: str) -> tuple[int, int]:
    B, S, T, Hq, Hkv, D, P = sizes
    options: dict[str, Any] = {}
    seen = Seen()
    with ExitStack() as stack:
        for context in (shapes_only(), watched(seen)) if EMULATED else (FakeTensorMode(), Dispatched(seen)):
            stack.enter_context(context)

        def make(batch: int, length: int, heads: int) -> Tensor:
            return (
                torch.randn(batch, length, heads, D, device=GPU, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            )

        prefix = [torch.randn(P, Hkv, D, device=GPU).transpose(0, 1).requires_grad_() for _ in range(2)]
        leaves = [make(B, S, Hq), make(B, T, Hkv), make(B, T, Hkv), *prefix]
        if "packed" in kind:
            options |= {"cu_seqlens": torch.zeros(9, dtype=torch.int32, device=GPU), "max_seqlen": S // 8}
        if "softcap" in kind:
            options |= {"softcap": 50.0}
        if "mask" in kind:
            options |= {"causal": False, "mask": torch.zeros(B, 1, S, T, dtype=torch.bool, device=GPU)}
        if "bias" in kind:
            options |= {"bias": torch.zeros(1, Hq, S, T, device=GPU, dtype=torch.bfloat16)}
        seen.launched.clear()
        seen.doing = "forward"
        out = prefix_attention(*leaves, **options)
        seen.doing = "backward"
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return seen.launches("forward"), seen.launches("backward")


@pytest.mark.parametrize("case", OPERATOR)
def test_the_operator_launches_no_more(case: str) -> None:
    sizes, kind, most = OPERATOR[case]
    found = operator(sizes, kind)
    assert all(one <= limit for one, limit in zip(found, most, strict=True)), found
