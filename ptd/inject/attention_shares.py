"""Watch a prompt in attention: measure each head's share of attention on the prompt, and hide parts of the prompt.

No kernel materialises attention probabilities, and none has to, because attention is linear in the values. If the
values are the indicator of virtual token p, the output *is* the probability of p, computed by the same kernel under the
same rule (causal, window, softcap, bias, packing, grouped heads) as the model's own pass. The sum over p is
exp(L_prefix − L), where L_prefix is the log-sum-exp of the prefix segment and L that of both segments together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from ptd_kernels import prefix_attention
from torch import Tensor, nn

from ptd.inject.attach import Attachment
from ptd.inject.attention import LayerSlot, watched
from ptd.types import IGNORE_INDEX, Batch, UserError, virtual_id

ALL, SUPERVISED = 0, 1
"""The two sets of queries: all own tokens of a sequence, and its own tokens at supervised positions."""


@dataclass(frozen=True)
class LayerShares:
    """Attention shares of one layer on some rows: sums in float64, to be added over ranks and divided by their counts.

    ``mass`` ``[2, Hq, P]``: probability of each virtual token, summed over the queries of each of the two sets;
    ``queries`` ``[2]``: number of queries per set. ``norms`` ``[2]``: Euclidean norms of the own keys and of the own
    values, averaged over heads and summed over the own tokens; ``keys`` ``[1]``: number of own tokens.
    """

    mass: Tensor
    queries: Tensor
    norms: Tensor
    keys: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.mass, self.queries, self.norms, self.keys

    def __add__(self, other: LayerShares) -> LayerShares:
        return LayerShares(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))


class _Tokens:
    """The token ids that run in each stack, as the embedding layers see them: virtual tokens have negative ids."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._two = len(attachment.stacks) == 2
        self._kinds = {
            id(slot): layer.kind for slot, layer in zip(attachment.slots, attachment.shape.layers, strict=True)
        }
        self._seen: list[Tensor] = []

    def sides(self, slot: LayerSlot) -> tuple[int, int]:
        """Return the stack that the layer's queries come from, and the stack that its keys come from: 0 or 1."""
        kind = self._kinds[id(slot)]
        return int(self._two and kind != "encoder"), int(self._two and kind == "decoder")

    def of(self, side: int) -> Tensor:
        """Return the ids ``[B, S]``, packed ``[1, N]``, of the stack that runs first (0) or second (1)."""
        return self._seen[side]

    @contextmanager
    def watching(self, watch: Callable[..., Tensor]) -> Iterator[None]:
        embeddings: set[nn.Module] = {stack.embeddings for stack in self._attachment.stacks}
        hooks = [self._attachment.model.register_forward_pre_hook(lambda module, args: self._seen.clear())]
        # These hooks run before the hook of the stack, which replaces the id of a virtual token by 0.
        hooks += [module.register_forward_pre_hook(self._see, prepend=True) for module in embeddings]
        token = watched.set(watch)
        try:
            yield
        finally:
            watched.reset(token)
            for hook in hooks:
                hook.remove()

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen.append(args[0])


class SharesOfPrompt:
    """Record, while batches run ``within`` it, the share of every layer's attention that goes to each virtual token.

    ``layers[l]`` belongs to attention layer ``l``, in the order of the backbone's shape. The shares are exact for every
    rule of a layer, and are computed in at least fp32 from the model's own queries and keys.
    """

    def __init__(self, attachment: Attachment) -> None:
        if not attachment.replaces_attention:
            raise UserError(
                f"{type(attachment.model).__name__} keeps its own attention code, so the shares of its attention "
                "cannot be measured; inspect the prompt without --data, or compare losses with ptd eval"
            )
        self.layers: dict[int, LayerShares] = {}
        self._attachment = attachment
        self._index = {id(slot): index for index, slot in enumerate(attachment.slots)}
        self._tokens = _Tokens(attachment)
        self._batch: Batch | None = None
        self._weights: dict[int, Tensor] = {}

    @contextmanager
    def within(self, batch: Batch) -> Iterator[None]:
        """Record one forward pass over ``batch``. A batch without rows does not count."""
        self._batch, self._weights = batch, {}
        with self._tokens.watching(self._watch):
            yield

    def _watch(
        self,
        slot: LayerSlot,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        **rule: Any,
    ) -> Tensor:
        queries, keys = self._tokens.sides(slot)
        weights_2BS, own_BT = self._queries(queries), self._queries(keys)[ALL]
        norms = [(x.double().norm(dim=-1).mean(dim=1) * own_BT).sum() for x in (k, v)]
        found = LayerShares(
            self._mass(self._tokens.of(keys), weights_2BS, q, k, prefix_k, rule),
            weights_2BS.sum(dim=(1, 2)),
            torch.stack(norms),
            own_BT.sum()[None],
        )
        index = self._index[id(slot)]
        self.layers[index] = self.layers[index] + found if index in self.layers else found
        return prefix_attention(q, k, v, prefix_k, prefix_v, **rule)

    def _mass(
        self, keys: Tensor, weights: Tensor, q: Tensor, k: Tensor, prefix_k: Tensor | None, rule: dict[str, Any]
    ) -> Tensor:
        """Return each virtual token's probability, summed over queries with ``weights`` ``[2, B, S]``: ``[2, Hq, P]``.

        ``keys`` ``[B, T]``: the ids of the own keys.
        """
        soft = self._attachment.stacks[0].soft
        count = prefix_k.shape[1] if prefix_k is not None else 0 if soft is None else soft.shape[0]
        work = torch.promote_types(q.dtype, torch.float32)
        heads, width = k.shape[1], k.shape[3]  # every kernel supports values as wide as the keys
        prefix_k = None if prefix_k is None else prefix_k.to(q.dtype).to(work)
        q, k, weights = q.to(work), k.to(work), weights.to(work)
        number_P = torch.arange(count, device=q.device)
        parts = []
        for begin in range(0, max(count, 1), width):
            chosen_E = torch.arange(begin, begin + width, device=q.device)
            own_BTE = (keys[..., None] == virtual_id(0) - chosen_E).to(work)
            own_v = own_BTE[:, None].expand(-1, heads, -1, -1).contiguous()
            prefix_v = None
            if prefix_k is not None:
                prefix_v = (number_P[:, None] == chosen_E).to(work).expand(heads, -1, -1).contiguous()
            mass_BHSE = prefix_attention(q, k, own_v, prefix_k, prefix_v, **rule)
            parts.append(torch.einsum("bhse,nbs->nhe", mass_BHSE, weights).double())
        return torch.cat(parts, dim=-1)[..., :count]

    def _queries(self, side: int) -> Tensor:
        """Return 1 for each token of the two sets, float64 ``[2, B, S]``, in the layout of the tokens that run."""
        if side not in self._weights:
            self._weights[side] = self._make_queries(side)
        return self._weights[side]

    def _make_queries(self, side: int) -> Tensor:
        batch = self._batch
        assert batch is not None
        ran, counts = self._tokens.of(side), bool(batch.rows)
        supervised = batch.labels != IGNORE_INDEX
        source = batch.source if side == 0 else None
        if source is not None:
            batch, supervised = source, torch.zeros_like(source.input_ids, dtype=torch.bool)
        own = batch.input_ids >= 0
        if batch.cu_seqlens is None:
            own = own & batch.attention_mask
        weights = torch.zeros(2, *ran.shape, dtype=torch.float64, device=ran.device)
        if counts:
            sets = torch.stack([own, own & supervised]).to(ran.device).double().flatten(1)
            # The batch contains neither the virtual tokens before its sequences nor the tokens after all of them.
            place = ran >= 0 if self._attachment.stacks[side].in_front else torch.ones_like(ran, dtype=torch.bool)
            place = place.flatten().nonzero()[: sets.shape[1], 0]
            weights.flatten(1)[:, place] = sets
        return weights


@contextmanager
def attending_only_to(attachment: Attachment, kept: Sequence[int]) -> Iterator[None]:
    """Hide all virtual tokens that are not among ``kept`` from every query of every layer.

    Everything else, including positions, stays as with the whole prompt, so the difference in the output is the effect
    of the hidden tokens. A hidden token at a mark whose position predicts something still attends to itself there.
    """
    tokens = _Tokens(attachment)
    numbers = torch.tensor(sorted(kept), dtype=torch.long)

    def watch(
        slot: LayerSlot, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, **rule: Any
    ) -> Tensor:
        if prefix_k is not None and prefix_v is not None:
            rows = numbers.to(q.device)
            return prefix_attention(q, k, v, prefix_k[:, rows], prefix_v[:, rows], **rule)
        queries, keys = tokens.sides(slot)
        ids_BT = tokens.of(keys)
        hidden_BST = ((ids_BT < 0) & ~torch.isin(ids_BT, virtual_id(0) - numbers.to(ids_BT)))[:, None].expand(
            -1, q.shape[2], -1
        )
        if queries == keys:  # a hidden token still sees itself: its output is not read, but must be finite
            hidden_BST = hidden_BST & ~torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        bias = torch.zeros_like(hidden_BST, dtype=q.dtype).masked_fill(hidden_BST, -torch.inf)[:, None]
        given = rule.pop("bias")
        return prefix_attention(q, k, v, None, None, bias=bias if given is None else given + bias, **rule)

    with tokens.watching(watch):
        yield
