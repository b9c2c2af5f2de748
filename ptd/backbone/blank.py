"""A backbone from its config alone, without weights: for sizes. Built inside ``FakeTensorMode``."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptd.backbone.load import _CLASSES, _model_config, _readable
from ptd.config import BackboneConfig
from ptd.types import Output


def blank_model(config: BackboneConfig, output: Output = "causal_lm") -> PreTrainedModel:
    """The model that `ptd.backbone.load_model` would load, by its config and not quantised; its tensors have no data.

    Raises `UserError` for a config that cannot be read.
    """
    model_config = _model_config(config)
    with _readable(config):
        model: PreTrainedModel = _CLASSES[output][0].from_config(
            model_config, trust_remote_code=config.trust_remote_code
        )
    return model.get_encoder() if output == "body" and model_config.is_encoder_decoder else model
