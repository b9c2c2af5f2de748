"""Injection: put a prompt into a model's attention or embeddings, depending on the type of the prompt state."""

from ptd.inject.attach import Attachment, check_supported
from ptd.inject.attention_shares import LayerShares, SharesOfPrompt, attending_only_to
from ptd.inject.compile import compile_each, compile_layers
from ptd.inject.explain import CACHE, check_backend, explain_attention, standing_in_for_gpu
from ptd.inject.inputs import decoder_start
from ptd.inject.output_layer import PassOutput
from ptd.inject.probe import context_of

__all__ = [
    "CACHE",
    "Attachment",
    "LayerShares",
    "PassOutput",
    "SharesOfPrompt",
    "attending_only_to",
    "check_backend",
    "check_supported",
    "compile_each",
    "compile_layers",
    "context_of",
    "decoder_start",
    "explain_attention",
    "standing_in_for_gpu",
]
