"""``ptd plan``: what a run needs and where it fits, from its configuration alone."""

from __future__ import annotations

from ptd.backbone import architecture_of, load_tokenizer
from ptd.backbone.blank import blank_model
from ptd.config import RunConfig
from ptd.engine.forward import Forward
from ptd.engine.ranks import Ranks
from ptd.engine.sample import rows_of, sample_batch
from ptd.engine.setup import Prepared
from ptd.engine.trace import Capability, Trace, split_encoder, trace_step, without_data
from ptd.inject import Attachment, check_supported
from ptd.methods import method
from ptd.tasks import Task, make_task
from ptd.train import build_step, build_trained, facts_of
import torch


def trace_run(config: RunConfig, *, rows: int, capability: Capability, local_ranks: int, supervised: float = 1.0) -> Trace:
    ranks = Ranks(0, 1, 1, torch.device("cpu"))
    task = make_task(config.task, config.data, architecture_of(config.backbone))
    facts = facts_of(config, task)
    method(config.method_name).check(config.method_config(), facts)
    with without_data(capability) as seen:
        model = blank_model(config.backbone, task.output, check=check_supported)
        attachment = Attachment(model, backend=config.backbone.attention)
        prepared = Prepared(model, attachment, Forward(model, attachment, ranks.device), "")
        trained = build_trained(config, prepared, task, None, ranks.device)
        split_encoder(trained.encoder, local_ranks)
        step = build_step(config, trained, ranks)
        batch = sample_batch(config, task, trained.readout, rows, packed=config.data.packing and attachment.packable, supervised=supervised)
        return trace_step(prepared, step, batch, seen, vocab_size=prepared.shape.vocab_size, on_gpu=capability is not None)
