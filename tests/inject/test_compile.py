"""Compiling the layers is refused where it cannot work; a generated token is compiled as one graph.

tests/engine/test_levers.py tests the compiled layers.
"""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, tiny_model
from transformers import CompileConfig

from ptd.inject import Attachment, compile_layers
from ptd.methods.prefix import PrefixEncoder
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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
@pytest.mark.parametrize(("family", "count"), [("llama", 1), ("gemma2", 2)])
def test_a_token_with_a_prefix_and_a_static_cache_is_one_graph(family, count):
    """So a GPU can run the whole pass as a CUDA graph. With padding on the left, masks are part of the pass.

    For a cache with a window, transformers counts the tokens on the host: the second token compiles the graph again.
    """
    model = tiny_model(family).requires_grad_(False)
    attachment = Attachment(model)
    encoder = PrefixEncoder(attachment.shape.layers, 4)
    attachment.set(encoder.state(encoder().detach()))
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    graphs = []

    def keep(graph, examples):
        graphs.append(graph)
        return graph

    compiled = CompileConfig(fullgraph=True, backend=keep, mode=None)
    compiled._compile_all_devices = True
    options = {**attachment.generation_inputs(ids, mask), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = model.generate(**options, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, model.generate(**options))
    assert len(graphs) == count
