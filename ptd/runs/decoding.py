"""Build the decoding settings of a call, independently of the defaults that a checkpoint carries.

transformers fills every field that a call leaves unset from the model's ``generation_config``. Therefore ptd sets every
field, and hides the model's config during generation (`put_away`). The settings of the model's author apply only if the
user asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedModel

from ptd.types import UserError

NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "guidance_scale": None,
    "watermarking_config": None,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
}
"""Fields that change the text, at values without effect. For these only, ``generation_config: model`` takes the model's
values."""

OURS: dict[str, Any] = {
    "max_length": None,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "max_cache_len": None,
    "prefill_chunk_size": None,
    "low_memory": None,
    "compile_config": None,
    "disable_compile": None,
    "continuous_batching_config": None,
    "token_healing": False,
    "use_mtp": None,
    "is_assistant": False,
    "num_assistant_tokens": None,
    "num_assistant_tokens_schedule": None,
    "assistant_confidence_threshold": None,
    "assistant_early_exit": None,
    "assistant_lookbehind": None,
    "assistant_ensemble_weight": None,
    "target_lookbehind": None,
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": None,
    "speculation_type": None,
}
"""Fields that decide how a call runs and what it returns. They always have the values that ptd needs."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")
_TOP_K_UNSET = 50
"""The value that transformers reads as an unset ``top_k``; without sampling, it warns of any other value."""


@dataclass(frozen=True)
class Decoding:
    """How to choose the next token: greedily by default, by sampling (``temperature``) or beam search (``num_beams``).

    A field that is None has no effect (greedy, all tokens, one beam). With ``generation_config="model"`` it has the
    value that the model's author set, and the author's penalties, banned tokens and length limits apply as well.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int | None = None
    seed: int = 0
    generation_config: Literal["neutral", "model"] = "neutral"


@dataclass(frozen=True)
class Tokens:
    """The token ids that generation needs.

    ``ends``: the ids that end a text. ``pad``: the id for padding. Of an encoder-decoder, ``start``: the id from which
    the decoder starts; ``first``: the id that it has to generate first (None: any).
    """

    ends: tuple[int, ...]
    pad: int
    bos: int | None = None
    start: int | None = None
    first: int | None = None


def generation_config(decoding: Decoding, own: GenerationConfig, tokens: Tokens, max_new_tokens: int) -> Any:
    """Return the config of one call, with a value for every field; ``own`` is the model's config.

    Raises `UserError` for settings that have no effect.
    """
    fields = {**NEUTRAL, **OURS, "forced_bos_token_id": tokens.first}
    if decoding.generation_config == "model":
        fields |= set_by_author(own)
    asked = {name: getattr(decoding, name) for name in ("temperature", "top_p", "top_k", "num_beams")}
    fields |= {name: value for name, value in asked.items() if value is not None}
    if decoding.temperature is not None:
        fields["do_sample"] = decoding.temperature > 0
    if not fields["do_sample"]:
        for name in ("top_p", "top_k"):
            if asked[name] not in (None, NEUTRAL[name]):
                raise UserError(
                    f"--{name.replace('_', '-')}: has no effect without sampling; give --temperature above 0, or "
                    "remove it"
                )
        fields |= {name: NEUTRAL[name] for name in _SAMPLING} | {"top_k": _TOP_K_UNSET}
    if fields["num_beams"] == 1:
        fields |= {name: NEUTRAL[name] for name in _BEAMS}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(tokens.ends) or None,
        pad_token_id=tokens.pad,
        bos_token_id=tokens.bos,
        decoder_start_token_id=tokens.start,
        **fields,
    )


def set_by_author(own: GenerationConfig) -> dict[str, Any]:
    """Return the fields of the model's ``generation_config`` that change the text, with their values."""
    found = {name: getattr(own, name, None) for name in NEUTRAL}
    changed = {name: value for name, value in found.items() if value is not None and value != NEUTRAL[name]}
    if not changed.get("do_sample"):
        changed = {name: value for name, value in changed.items() if name not in _SAMPLING}
    if "num_beams" not in changed:
        changed = {name: value for name, value in changed.items() if name not in _BEAMS}
    return changed


def note_on_author(decoding: Decoding, own: GenerationConfig) -> str | None:
    """Return a note on whether the model's settings apply; None if none of them changes the text."""
    listed = ", ".join(f"{name} {_shown(value)}" for name, value in set_by_author(own).items())
    if not listed:
        return None
    if decoding.generation_config == "model":
        return f"decoding follows the model's generation_config: {listed}"
    return f"the model's generation_config is not followed ({listed}); give --generation-config model to follow it"


@contextmanager
def put_away(model: PreTrainedModel) -> Iterator[None]:
    """Give the model an empty ``generation_config`` inside the ``with`` block, so that a call inherits no setting."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
