"""Load the backbone on this rank, shard it if configured, and attach the injection: the start of every command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ptd.backbone import dtype_of, fingerprint, load_model
from ptd.config import BackboneConfig
from ptd.distributed.preflight import same_fingerprint
from ptd.distributed.ranks import Ranks
from ptd.engine.bucket_padding import pays
from ptd.engine.forward import Forward
from ptd.engine.host_memory import keep_freed_memory
from ptd.inject import Attachment, check_supported
from ptd.types import BackboneShape, Output, UserError


@dataclass(frozen=True)
class Prepared:
    """A frozen backbone that can be given a prompt (``attachment.set``) and run batches (``run``)."""

    model: PreTrainedModel
    attachment: Attachment
    run: Forward
    fingerprint: str
    sharded: bool = False
    """Whether all ranks have to run every forward pass together."""
    forget_passes: Callable[[], None] = lambda: None
    """Call it before training: it makes DeepSpeed forget earlier passes, which had no backward pass."""

    @property
    def shape(self) -> BackboneShape:
        return self.attachment.shape


def prepare(
    config: BackboneConfig, ranks: Ranks, zero3: dict[str, Any] | None = None, *, output: Output = "causal_lm"
) -> Prepared:
    """Load the backbone, shard it if ``config`` says so, and attach the injection. Every rank calls this together.

    ``zero3``: DeepSpeed's configuration of a sharded backbone (`ptd.config.deepspeed.apply_deepspeed`).
    """
    assert config.sharded == (zero3 is not None), "a sharded backbone has a DeepSpeed configuration, no other one has"
    shards = None
    if zero3 is None:
        model = load_model(config, output, device=ranks.device, check=check_supported)
    else:
        from ptd.distributed.zero3 import Shards  # importing deepspeed takes seconds; only sharded runs pay for it

        group = ranks.shard_group(config)
        shards = Shards(zero3, group, dtype=dtype_of(config))
        with shards.receiving():
            model = load_model(config, output, device=ranks.device, sharded=True, check=check_supported)
        shards.run(model)
    # Of a sharded backbone only rank 0 has the leading values, and the shards' checksums were compared during loading.
    identity = (
        ranks.on_main(lambda: fingerprint(model)) if config.sharded else same_fingerprint(fingerprint(model), ranks)
    )
    forget_passes = shards.forget_passes if shards is not None else lambda: None
    attachment = Attachment(model, backend=config.attention, forget_passes=forget_passes)
    if ranks.device.type == "cpu":  # after loading, which frees memory that no step needs
        keep_freed_memory()
    run = Forward(attachment, ranks.device, rounds=pays(ranks.device, dtype_of(config)))
    prepared = Prepared(model, attachment, run, identity)
    forget_passes()
    return replace(prepared, sharded=shards is not None, forget_passes=forget_passes)


def check_context(context: int | None, num_virtual_tokens: int, max_length: int) -> None:
    """Raise `UserError` if prompt and sequences together are longer than the backbone's ``context``.

    ``num_virtual_tokens``: positions that the prompt needs in addition to those of the sequences.
    """
    if context is None or num_virtual_tokens + max_length <= context:
        return
    room = context - num_virtual_tokens
    if room < 2:
        raise UserError(
            f"method.num_virtual_tokens: {num_virtual_tokens} virtual tokens do not fit into the backbone's context of "
            f"{context} tokens; use at most {context // 2}"
        )
    too_long = f"data.max_length={max_length} exceeds"
    if num_virtual_tokens:
        too_long = f"method.num_virtual_tokens={num_virtual_tokens} and data.max_length={max_length} together exceed"
    raise UserError(f"{too_long} the backbone's context of {context} tokens; set data.max_length to at most {room}")
