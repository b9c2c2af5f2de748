"""Explain which attention backend this machine would use, and why, before a run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ptd_kernels import available_backends, explain_backend, stand_in
from ptd_kernels.prefix_attention.problem import check_problem, choose_backend
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ptd.types import UserError

CACHE = "cache"
"""The backend that leaves attention to the model, and gives it the prefix in its own cache of keys and values."""
CASES: dict[str, dict[str, bool]] = {
    "packed": {"packed": True},
    "padded": {"masked": True},
    "without a mask": {},
    "with a bias (T5)": {"biased": True},
}
"""Kinds of batches, with the arguments of `explain_backend` for each kind."""


def check_backend(name: str) -> None:
    """Raise `UserError` unless ``backbone.attention`` names a backend, or ``auto``."""
    if name not in ("auto", CACHE, *available_backends()):
        known = ", ".join(["auto", *available_backends(), CACHE])
        raise UserError(f"backbone.attention: there is no backend {name!r}; available: {known}")


def obstacle_to_several(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why ``backend`` cannot give each sequence a prefix of its own, although it can give all the same one.

    None: it can, or it can do neither.
    """
    with unset_fake_temporarily():
        try:
            q = torch.zeros(1, 1, 2, head_dim, device=device, dtype=dtype)
            prefix = q[0, :, :1]
            bounds = torch.tensor([0, 1, 2], device=device, dtype=torch.int32)
            choose_backend(check_problem(q, q, q, prefix, prefix, cu_seqlens=bounds, max_seqlen=1), backend)
        except ValueError:
            return None
        several, index = [prefix] * 2, torch.tensor([0, 1])
        try:
            choose_backend(
                check_problem(q, q, q, several, several, cu_seqlens=bounds, max_seqlen=1, prefix_index=index), backend
            )
        except ValueError as error:
            return str(error)
    return None


def explain_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, dict[str, str]]:
    """Return, for each kind of batch and each backend, how the backend would solve it, or why it cannot.

    The text of ``auto`` begins with the backend that it chooses.
    """
    found: dict[str, dict[str, str]] = {}
    for case, options in CASES.items():
        found[case] = {}
        for backend in ("auto", *available_backends()):
            try:
                chosen, reason = explain_backend(
                    device=device, dtype=dtype, head_dim=head_dim, backend=backend, **options
                )
            except ValueError as error:
                chosen, reason = backend, str(error)
            found[case][backend] = f"{chosen}: {reason}" if backend == "auto" else reason
    return found


@contextmanager
def standing_in_for_gpu(capability: tuple[int, int] | None) -> Iterator[None]:
    """Treat CPU tensors without data (FakeTensorMode) in attention as a GPU of this compute capability would."""
    token = stand_in.set(capability)
    try:
        yield
    finally:
        stand_in.reset(token)
