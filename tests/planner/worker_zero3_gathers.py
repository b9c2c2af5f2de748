"""Take four steps of a ZeRO-3 run; report the size of a rank's shards and the bytes it sends in the fourth step.

torchrun … worker_zero3_gathers.py RUN.json RESULTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ptd.backbone import architecture_of
from ptd.config import parse_config
from ptd.config.deepspeed import apply_deepspeed
from ptd.distributed.network_meter import NetworkMeter, metered_deepspeed
from ptd.distributed.ranks import Ranks
from ptd.engine.setup import prepare
from ptd.planner.worst_case_batch import rows_of, sample_batch
from ptd.readouts.language_model import LanguageModel
from ptd.runs.build import build_trained
from ptd.tasks import make_task

config, zero3 = apply_deepspeed(parse_config(json.loads(Path(sys.argv[1]).read_text())))
ranks = Ranks.start(needs_group=True)
task = make_task(config.task, config.data, architecture_of(config.backbone))
prepared = prepare(config.backbone, ranks, zero3, output=task.output)
trained = build_trained(config, prepared, task, None)
prepared.forget_passes()  # the passes that initialised the prompt
batch = sample_batch(config, task, LanguageModel(), rows_of(config), packed=True)
parameters = list(prepared.model.parameters())
meter = NetworkMeter(ranks)
for _ in range(4):
    meter.take()
    prepared.attachment.set(trained.encoder.state(trained.encoder()))
    with metered_deepspeed(meter):
        LanguageModel()(prepared.run, batch).loss.backward()
shards = sum(p.ds_tensor.numel() for p in parameters)
if ranks.is_main:
    sent = sum(size for (_, source, _), size in meter.take().items() if source == "backbone")
    Path(sys.argv[2]).write_text(json.dumps({"shards": shards, "sent": sent}))
ranks.stop()
