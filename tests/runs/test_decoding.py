"""Decoding follows the user's options: a hostile ``generation_config`` has no effect unless the user asks for it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EOS, MASK, PAD, UNK, save_backbone, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from ptd.commands.generate import generate
from ptd.distributed.ranks import Ranks
from ptd.runs.decoding import NEUTRAL, OURS, Decoding, Tokens, generation_config, note_on_author, put_away
from ptd.runs.generation import batches_of, decode, tokens_of
from ptd.runs.tuned import load_tuned
from ptd.types import Reporter, UserError

HOSTILE: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 3,
    "top_p": 0.2,
    "min_p": 0.4,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "num_beams": 3,
    "early_stopping": True,
    "length_penalty": 3.0,
    "min_length": 40,
    "min_new_tokens": 7,
    "max_new_tokens": 3,
    "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[50]],
    "suppress_tokens": list(range(40, 150)),
    "begin_suppress_tokens": list(range(150, 261)),
    "forced_bos_token_id": 30,
    "forced_eos_token_id": 31,
    "exponential_decay_length_penalty": [1, 2.0],
    "sequence_bias": [[[60], 9.0]],
    "guidance_scale": 3.0,
    "renormalize_logits": True,
    "stop_strings": ["a", "e"],
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_attentions": True,
    "cache_implementation": "static",
    "use_cache": False,
    "prompt_lookup_num_tokens": 3,
    "token_healing": True,
}
PROMPTS = ["the cat", "a", "in the old town 12"]
FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
OF_A_CALL = {"max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}


@pytest.fixture(scope="module", params=["llama", "t5", "bart"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Save the same backbone twice: with a plain ``generation_config`` and with a hostile one."""
    folder = tmp_path_factory.mktemp(request.param)
    plain, hostile = (save_backbone(folder / name, request.param) for name in ("plain", "hostile"))
    file = hostile / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **HOSTILE}))
    return plain, hostile


class Told(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def greedy(folder: Path, prompt: str, count: int) -> str:
    """Return the text of the most likely tokens, from a loop of plain forward passes without a cache."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tokenizer, config = tiny_tokenizer(), json.loads((folder / "config.json").read_text())
    both = config.get("is_encoder_decoder", False)
    model = (AutoModelForSeq2SeqLM if both else AutoModelForCausalLM).from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count and (not written or written[-1] != EOS):
            if both:
                so_far = torch.tensor([[config["decoder_start_token_id"], *written]])
                logits = model(input_ids=ids, decoder_input_ids=so_far).logits
            else:
                logits = model(input_ids=torch.cat([ids, torch.tensor([written], dtype=torch.long)], 1)).logits
            written.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(written, skip_special_tokens=True))


def test_greedy_is_the_likeliest_token_whatever_the_author_set(pair: tuple[Path, Path]) -> None:
    plain, hostile = pair
    decoding = Decoding(max_new_tokens=12)
    expected = [greedy(plain, prompt, 12) for prompt in PROMPTS]
    assert generate(PROMPTS, adapter=None, backbone=str(plain), decoding=decoding) == expected
    told = Told()
    assert generate(PROMPTS, adapter=None, backbone=str(hostile), decoding=decoding, reporter=told) == expected
    (said,) = [note for note in told.notes if "generation_config" in note]
    assert said.startswith("the model's generation_config is not followed (do_sample True, num_beams 3")
    assert "min_length 40" in said
    assert "num_return_sequences" not in said


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.5, "top_k": 20}]
)
def test_beams_and_samples_are_the_users_too(pair: tuple[Path, Path], options: dict[str, Any]) -> None:
    decoding = Decoding(max_new_tokens=8, seed=3, **options)
    plain, hostile = (generate(PROMPTS, adapter=None, backbone=str(path), decoding=decoding) for path in pair)
    assert plain == hostile


def test_every_field_of_transformers_has_a_value_of_its_own() -> None:
    """This fails if a later transformers has a new field: add its neutral value to ptd/runs/decoding.py."""
    assert set(NEUTRAL) | set(OURS) | OF_A_CALL == FIELDS
    assert not set(NEUTRAL) & set(OURS)
    given = set(inspect.signature(generation_config).parameters)
    assert given == {"decoding", "own", "tokens", "max_new_tokens"}


def test_nothing_is_filled_in_from_the_model() -> None:
    """transformers' own preparation of a call takes no field from the model, including fields of later versions."""
    model = tiny_model("llama")
    before = model.generation_config = GenerationConfig(**HOSTILE, a_new_field=1)
    tokens = Tokens((EOS,), PAD)
    config = generation_config(Decoding(max_new_tokens=5), model.generation_config, tokens, 5)
    with put_away(model):
        used, _ = model._prepare_generation_config(config)
    assert model.generation_config is before
    defaults = GenerationConfig._get_default_generation_params()
    expected = {**defaults, **{name: value for name, value in {**OURS, **NEUTRAL}.items() if value is not None}}
    expected |= {"max_new_tokens": 5, "eos_token_id": [EOS], "pad_token_id": PAD, "top_k": 50}
    for name in FIELDS:
        assert getattr(used, name) == expected.get(name), name
    assert not hasattr(used, "a_new_field")
    with pytest.raises(RuntimeError), put_away(model):
        raise RuntimeError
    assert model.generation_config is before


def test_the_authors_settings_are_followed_where_the_user_says_so(tmp_path: Path) -> None:
    plain, author = (save_backbone(tmp_path / name) for name in ("plain", "author"))
    (usual,) = generate(PROMPTS[:1], adapter=None, backbone=str(plain), decoding=Decoding(max_new_tokens=12))
    (banned,) = tiny_tokenizer()(next(letter for letter in usual if letter.isascii()))["input_ids"]
    settings = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "suppress_tokens": [banned], "top_p": 0.3}
    file = author / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings, "return_dict_in_generate": True}))
    told = Told()
    decoding = Decoding(max_new_tokens=12, generation_config="model")
    found = generate(PROMPTS[:1], adapter=None, backbone=str(author), decoding=decoding, reporter=told)
    assert told.notes == [
        "decoding follows the model's generation_config: repetition_penalty 1.7, no_repeat_ngram_size 2, "
        f"suppress_tokens [{banned}]"
    ]
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(author), tiny_tokenizer()
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, return_dict_in_generate=False, pad_token_id=PAD)
    assert found == tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found != [usual]
    # The user's options take precedence: the author samples, the user does not.
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": True, "temperature": 2.0}))
    asked = Decoding(max_new_tokens=12, temperature=0, generation_config="model")
    assert generate(PROMPTS[:1], adapter=None, backbone=str(author), decoding=asked) == found
    # Settings that transformers no longer supports are refused, with the reason that it gives.
    file.write_text(json.dumps({**json.loads(file.read_text()), "penalty_alpha": 0.6, "top_k": 4, "do_sample": False}))
    with pytest.raises(UserError, match="--generation-config: transformers rejects the model's own settings"):
        generate(PROMPTS[:1], adapter=None, backbone=str(author), decoding=decoding)


def test_settings_that_contradict_each_other_stop_nothing_but_those_who_ask_for_them(tmp_path: Path) -> None:
    plain, wrong = (save_backbone(tmp_path / name) for name in ("plain", "wrong"))
    file = wrong / "generation_config.json"
    tokens = json.loads(file.read_text())
    file.write_text(json.dumps({**tokens, "num_return_sequences": 2, "repetition_penalty": 1.5}))
    with pytest.raises(ValueError, match="num_return_sequences"):
        GenerationConfig.from_pretrained(wrong)
    decoding = Decoding(max_new_tokens=12)
    expected = generate(PROMPTS, adapter=None, backbone=str(plain), decoding=decoding)
    assert generate(PROMPTS, adapter=None, backbone=str(wrong), decoding=decoding) == expected
    told = Told()
    own = Decoding(max_new_tokens=12, generation_config="model")
    generate(PROMPTS, adapter=None, backbone=str(wrong), decoding=own, reporter=told)
    assert told.notes == ["decoding follows the model's generation_config: repetition_penalty 1.5"]
    file.write_text(json.dumps({**tokens, "forced_bos_token_id": 30, "suppress_tokens": [30]}))
    assert generate(PROMPTS, adapter=None, backbone=str(wrong), decoding=decoding) == expected
    with pytest.raises(UserError, match="--generation-config: transformers rejects the model's own settings"):
        generate(PROMPTS, adapter=None, backbone=str(wrong), decoding=own)


def test_stop_strings_of_the_author_stop_where_the_user_says_so(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "b")
    plain = generate(["the cat"], adapter=None, backbone=str(folder), decoding=Decoding(max_new_tokens=12))[0]
    stop = next(letter for letter in plain[3:] if letter.isascii() and letter not in plain[:3])
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "stop_strings": [stop]}))
    decoding = Decoding(max_new_tokens=12, generation_config="model")
    (found,) = generate(["the cat"], adapter=None, backbone=str(folder), decoding=decoding)
    assert found == plain[: plain.index(stop) + 1]


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.0}])
def test_a_nucleus_without_samples_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--top-[pk]: has no effect without sampling"):
        generation_config(Decoding(**option), GenerationConfig(), Tokens((EOS,), PAD), 5)
    chosen = generation_config(Decoding(top_p=1.0, top_k=0), GenerationConfig(), Tokens((EOS,), PAD), 5)
    assert not chosen.do_sample


def test_a_note_names_only_what_would_change_a_text() -> None:
    def note(**settings: Any) -> str | None:
        return note_on_author(Decoding(), GenerationConfig(**settings))

    assert note(use_cache=True, top_p=0.5, max_new_tokens=9, output_attentions=True, eos_token_id=3) is None
    assert "(do_sample True, top_p 0.5)" in str(note(do_sample=True, top_p=0.5))


ENDS = {"tokenizer": MASK, "author": UNK, "taught": EOS}


@pytest.mark.parametrize("source", ENDS)
def test_a_text_ends_at_what_any_source_calls_its_end(tmp_path: Path, source: str) -> None:
    """A model writes three end tokens in a row; each text stops at the first one and contains none of them."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    order = [ENDS[source], *(end for name, end in ENDS.items() if name != source)]
    model.save_pretrained(tmp_path)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ENDS["tokenizer"])
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [ENDS["author"]]}))
    ranks = Ranks.start()
    tuned = load_tuned(None, str(tmp_path), ranks)
    object.__setattr__(tuned, "taught", (ENDS["taught"],))
    assert set(tokens_of(tuned)[0].ends) == set(ENDS.values())

    letters = tokenizer("word")["input_ids"]
    script = [*letters, *order, *letters]
    width = len(tokenizer("a")["input_ids"])

    def say(module: Any, args: Any, options: dict[str, Any], output: Any) -> Any:
        """Replace the logits so that the model writes the next token of the script."""
        say.passes += 1  # type: ignore[attr-defined]
        output.logits[:] = 0
        output.logits[..., script[say.passes - 1]] = 9  # type: ignore[attr-defined]
        return output

    say.passes = 0  # type: ignore[attr-defined]
    tuned.prepared.model.register_forward_hook(say, with_kwargs=True)
    options = {"batch_size": 4, "reporter": Reporter()}
    texts = decode(tuned, [tokenizer("a")["input_ids"]] * 2, Decoding(max_new_tokens=9), ranks, **options)
    assert texts == ["word", "word"]
    assert say.passes == len(letters) + 1, "it stopped at the first end"  # type: ignore[attr-defined]
    assert width == 1


def test_an_ordinary_token_that_the_author_calls_an_end_is_none(tmp_path: Path) -> None:
    """Configs often keep the default of their class, an id that is a letter in this tokenizer."""
    folder = save_backbone(tmp_path / "b")
    letter = tiny_tokenizer()("e")["input_ids"][0]
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": letter}))
    tokens, note = tokens_of(load_tuned(None, str(folder), Ranks.start()))
    assert tokens.ends == (EOS,)
    assert note == (
        f"generation does not stop at {letter} ('e'), which generation_config names: "
        "in this tokenizer it is ordinary text"
    )


def test_tokens_beyond_the_vocabulary_neither_end_nor_fill(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "b")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<fill>"})
    tokenizer.save_pretrained(folder)
    tokens, _ = tokens_of(load_tuned(None, str(folder), Ranks.start()))
    assert (tokens.ends, tokens.pad) == ((EOS,), EOS)
    found = generate(PROMPTS, adapter=None, backbone=str(folder), decoding=Decoding(max_new_tokens=6))
    assert found == [greedy(folder, prompt, 6) for prompt in PROMPTS]


def test_no_long_prompt_shortens_the_answer_to_another(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "model", max_position_embeddings=48)
    tuned = load_tuned(None, str(folder), Ranks.start())

    def texts(*lengths: int) -> list[str]:
        prompts = [[7 + (place * length) % 200 for place in range(length)] for length in lengths]
        decoding = Decoding(max_new_tokens=16)
        return decode(tuned, prompts, decoding, Ranks.start(), batch_size=8, reporter=Reporter())

    together = texts(45, 5, 6, 44, 9)
    assert together == [texts(length)[0] for length in (45, 5, 6, 44, 9)]
    assert len(together[1]) > len(together[0]) > 0


def test_prompts_of_one_length_run_together_where_padding_on_the_left_is_wrong() -> None:
    lengths, limits = [5, 9, 5, 9, 5, 2], [16] * 6
    assert batches_of(lengths, limits, 2, one_length=True) == [[1, 3], [0, 2], [4], [5]]
    assert batches_of(lengths, limits, 4, one_length=False) == [[1, 3, 0, 2], [4, 5]]
