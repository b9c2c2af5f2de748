"""Check that the conditioner reads the same from a sharded backbone as from a whole one.

test_conditioning.py runs this file on every rank: ``worker_conditioning.py FAMILIES FOLDER``, with the path of
families.py and a folder of saved backbones, one per family.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from ptd.backbone import TextConditioner
from ptd.config import BackboneConfig
from ptd.distributed.ranks import Ranks
from ptd.engine.setup import prepare
from ptd.inject import Attachment

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
OUTPUTS = {"gemma3_text": "causal_lm", "bert": "body", "mbart": "seq2seq_lm"}


def main(families_file: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location("families", families_file)
    assert spec is not None
    assert spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    ranks = Ranks.start(needs_group=True)
    for family, output in OUTPUTS.items():
        config = BackboneConfig(path=str(Path(folder) / family), sharding="world")
        prepared = prepare(config, ranks, ZERO3, output=output)
        sharded = prepared.model
        assert not any(parameter.numel() for parameter in sharded.parameters())
        whole = families.tiny_model(family)
        attached = prepared.attachment, Attachment(whole)
        got, want = (TextConditioner(each, families.tiny_tokenizer()) for each in attached)
        ids = list(range(5, 5 + 70))
        assert torch.equal(got.embeddings(ids), whole.get_input_embeddings()(torch.tensor(ids)))
        assert torch.equal(*(each.keys_and_values(each.rows(40)) for each in (got, want)))
        if output == "body":
            assert got.hidden_size() == want.hidden_size() > 0


if __name__ == "__main__":
    main(*sys.argv[1:])
