"""The frozen backbone: loading it, identifying it, and running text through it for initialisers."""

from ptd.backbone.conditioning import TextConditioner
from ptd.backbone.fingerprint import fingerprint, part_of
from ptd.backbone.load import (
    architecture_of,
    dtype_of,
    embeddings_of,
    fusion_of,
    load_model,
    load_tokenizer,
    text_config_of,
    vocabulary_of,
)

__all__ = [
    "TextConditioner",
    "architecture_of",
    "dtype_of",
    "embeddings_of",
    "fingerprint",
    "fusion_of",
    "load_model",
    "load_tokenizer",
    "part_of",
    "text_config_of",
    "vocabulary_of",
]
