"""Compiling the layers is refused where it cannot work; tests/engine/test_levers.py tests the compiled layers."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from ptd.inject import Attachment, compile_layers
from ptd.types import UserError


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    model = tiny_model("llama")
    Attachment(model)
    with pytest.raises(UserError, match=r"backbone\.compile: torch\.compile found no C\+\+ compiler"):
        compile_layers(model)


def test_quantised_weights_are_refused():
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(UserError, match=r"backbone\.compile: weights that are sharded or quantised"):
        compile_layers(model)
