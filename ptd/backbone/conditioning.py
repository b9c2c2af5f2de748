"""The keys and values the backbone itself caches for a real text: where ``init: text`` starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ptd.types import UserError


class TextConditioner:
    """Runs the plain backbone (no prompt set) over a text and returns its cache.

    ``run`` is the callable model (under ZeRO-3 every rank has to call `text_kv` together).
    """

    def __init__(self, run: Callable[..., Any], tokenizer: Any, device: torch.device) -> None:
        self.run, self.tokenizer, self.device = run, tokenizer, device

    @torch.no_grad()
    def text_kv(self, text: str, num_virtual_tokens: int) -> Tensor:
        """Flat fp32 ``[P, sum over layers of H*(Dk+Dv)]`` on the CPU; keys stand as cached, rotated at 0…P−1.

        Raises `UserError` if the text has fewer than P tokens.
        """
        if self.tokenizer is None:
            raise UserError("method.init: text needs the backbone's tokenizer; pass tokenizer=… as well")
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) < num_virtual_tokens:
            raise UserError(
                f"method.init_text: the text has {len(ids)} tokens, fewer than method.num_virtual_tokens="
                f"{num_virtual_tokens}; give a longer text or set num_virtual_tokens to at most {len(ids)}"
            )
        tokens = torch.tensor([ids[:num_virtual_tokens]], device=self.device)
        cache = DynamicCache()  # without a config: no layer drops what lies outside its window
        self.run(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        blocks = [
            states[0].transpose(0, 1).reshape(num_virtual_tokens, -1)
            for layer in cache.layers
            for states in (layer.keys, layer.values)
        ]
        return torch.cat(blocks, dim=1).float().cpu()
