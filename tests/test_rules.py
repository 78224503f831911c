"""A checkpoint's generation_config.json: what generate() obeys is obeyed in every tree, what is not is named."""

import warnings

import pytest
import tiny
import torch
from conftest import load
from test_engine import PROMPT, ask, transformers_ids
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig

from specvlm import SpecVLM, UnsupportedModel
from specvlm.check import reference
from specvlm.runtime.model import VideoLM
from specvlm.runtime.rules import NOT_OBEYED, OBEYED, OURS, WITHOUT_EFFECT, RulesWarning

EOS, PAD = tiny.tokenizer(tiny.QWEN_PLACEHOLDER).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
FAMILY = "qwen2_5_vl"
LENGTH = 13


def model_of(monkeypatch, entries, draft="near", family=FAMILY):
    """A pair whose target's generation config has these entries."""
    target = load(family, "target")
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    for key, value in entries.items():
        setattr(config, key, value)
    monkeypatch.setattr(target.hf, "generation_config", config)
    return SpecVLM(VideoLM(target.hf, target.family, name="tiny"), load(family, draft))


def entries_of(text):
    """Entries that change this text of the tiny model, by the tokens that stand in it."""
    a, b, c, *_ = text
    unlike = sorted(set(range(30)) - set(text))
    return {
        "suppress_tokens": {"suppress_tokens": sorted(set(text[:6]))},
        "begin_suppress_tokens": {"begin_suppress_tokens": [a]},
        "bad_words_ids": {"bad_words_ids": [[b, c], [text[5]], [a, b, text[7], 3]]},
        "sequence_bias": {"sequence_bias": [[[a], -9.0], [[text[3], text[4]], -20.0], [[7], 2.5]]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
        "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [b, text[4]]},
        "min_length": {"min_length": 70, "eos_token_id": [a, c]},
        "forced_eos_token_id": {"forced_eos_token_id": EOS},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [3, 1.9], "eos_token_id": unlike},
        "several": {"repetition_penalty": 1.3, "sequence_bias": [[[a], -9.0]], "no_repeat_ngram_size": 2,
                    "bad_words_ids": [[b]], "remove_invalid_values": True, "renormalize_logits": True},
        "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=6.0)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def text():
    return ask(SpecVLM(load(FAMILY, "target")), drafter="none").token_ids


NAMES = list(entries_of(range(20)))
SPECULATIVE = ({"tree": "paper"}, {"tree": "chain:3"}, {"tree": "dynamic:12:4", "policy": "fixed"})


@pytest.mark.parametrize("name", NAMES)
def test_what_generate_obeys_is_obeyed_along_every_path(name, text, monkeypatch):
    entries = entries_of(text)[name]
    model = model_of(monkeypatch, entries)
    expected = transformers_ids(model, max_new_tokens=LENGTH)
    assert expected != text[:LENGTH]
    for way in ({"drafter": "none"}, *SPECULATIVE):
        assert ask(model, max_new_tokens=LENGTH, **way).token_ids == expected, way


@pytest.mark.parametrize("name", NAMES)
def test_sampled_text_is_the_plain_one_in_every_tree(name, text, monkeypatch):
    model = model_of(monkeypatch, entries_of(text)[name])
    sampled = {"max_new_tokens": LENGTH, "temperature": 0.9, "top_k": 40, "seed": 3}
    plain = ask(model, drafter="none", **sampled).token_ids
    for way in SPECULATIVE[::2]:
        assert ask(model, **way, **sampled).token_ids == plain


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != FAMILY])
def test_every_family_obeys(family, monkeypatch):
    plain = ask(SpecVLM(load(family, "target"))).token_ids
    model = model_of(monkeypatch, entries_of(plain)["several"], family=family)
    expected = transformers_ids(model, max_new_tokens=LENGTH)
    assert expected != plain[:LENGTH]
    assert ask(model, max_new_tokens=LENGTH).token_ids == expected


SAMPLED = (
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.02},
    {"eta_cutoff": 0.05},
    {"top_h": 0.4},
    {"top_h": 0.6, "typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002, "renormalize_logits": True,
     "repetition_penalty": 1.2, "watermarking_config": WatermarkingConfig(bias=1.5)},
)  # fmt: skip


@pytest.mark.parametrize("entries", SAMPLED)
def test_filters_of_sampling_are_in_force_where_it_samples(entries, monkeypatch):
    model = model_of(monkeypatch, entries)
    sampling = {"temperature": 0.8, "top_k": 60, "top_p": 0.97, "min_p": 0.001}
    request = model.request(tiny.video(6), PROMPT, **sampling, seed=1)
    start = model.prefill(request)
    out = model.target.stock().generate(
        input_ids=start.inputs.input_ids[None], **start.inputs.model_kwargs,
        **reference.positions(model.target, start.inputs), **sampling, max_new_tokens=2,
        do_sample=True, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    processors = model.target.rules.processors(start.prompt.input_ids, request.config.sampling)
    ours = processors(start.logits[None], (), ())
    torch.testing.assert_close(ours, out.scores[0], rtol=1e-4, atol=1e-4)
    assert torch.isinf(ours).any()
    sampling |= {"seed": 5, "max_new_tokens": LENGTH}
    assert ask(model, **sampling).token_ids == ask(model, drafter="none", **sampling).token_ids


def test_filters_of_sampling_leave_greedy_text_alone(text, monkeypatch):
    model = model_of(monkeypatch, {"typical_p": 0.2, "epsilon_cutoff": 0.02, "eta_cutoff": 0.05, "top_h": 0.4})
    assert ask(model).token_ids == text


def test_a_draft_follows_what_is_said_of_single_tokens(text, monkeypatch):
    banned = {text[1], text[5], text[7]}
    entries = {
        "suppress_tokens": [text[1]],
        "bad_words_ids": [[text[5]], [text[3], text[4]]],
        "sequence_bias": [[[text[7]], -99.0], [[1, 2, 3], 4.0]],
    }
    model = model_of(monkeypatch, entries)
    for sampling in ({}, {"temperature": 1.0, "seed": 2}):
        request = model.request(tiny.video(6), PROMPT, max_new_tokens=LENGTH, tree="paper", **sampling)
        drafted = {token for latest in model.rounds(request) for token in latest.draft.tokens.tolist()}
        assert drafted
        assert not drafted & banned


def test_without_entries_nothing_stands_between_logits_and_choice(monkeypatch):
    usual = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
             "bos_token_id": 1, "transformers_version": "4.0", "suppress_tokens": [], "num_beams": 1}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model_of(monkeypatch, usual)
    sampling = model.request(None, "a", temperature=0.5).config.sampling
    assert sampling.penalty == 1.05
    assert model.target.rules.processors(torch.tensor([1, 2]), sampling) is None
    assert model.target.rules.bias is None
    assert model.config.sampling.temperature == 0.0


def test_every_entry_that_transformers_knows_has_its_place():
    """A new one of a new version fails here; at run time it is warned about by name."""
    places = [OBEYED, OURS, WITHOUT_EFFECT, NOT_OBEYED.keys()]
    known = [name for place in places for name in place]
    assert len(known) == len(set(known))
    entries = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert entries <= set(known), entries - set(known)


OTHERS = {
    "assistant_ensemble_weight": 0.5, "constraints": ["x"], "diversity_penalty": 0.5, "dola_layers": "low",
    "force_words_ids": [[3]], "guidance_scale": 1.5, "max_length": 512, "max_new_tokens": 64, "max_time": 3.0,
    "num_beam_groups": 2, "num_beams": 4, "num_return_sequences": 2, "penalty_alpha": 0.6, "stop_strings": ["."],
    "token_healing": True, "an_entry_of_tomorrow": 1,
    "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, 2, 3]),
}  # fmt: skip


def test_an_entry_that_is_not_obeyed_is_warned_about_by_name(monkeypatch):
    assert set(OTHERS) >= set(NOT_OBEYED)
    with pytest.warns(RulesWarning) as found:
        model = model_of(monkeypatch, OTHERS)
    texts = [str(warning.message) for warning in found]
    for name in OTHERS:
        assert sum(f"tiny: {name}=" in text for text in texts) == 1, name
    assert not any("\n" in text for text in texts)
    answer = ask(model, max_new_tokens=LENGTH)
    inputs = model.read(model.request(tiny.video(6), PROMPT))
    assert reference.generate(model.target, inputs, max_new_tokens=LENGTH).token_ids == answer.token_ids


@pytest.mark.parametrize(
    "entries",
    [
        {"suppress_tokens": "a"},
        {"bad_words_ids": [3]},
        {"bad_words_ids": [[10**6]]},
        {"sequence_bias": [[[1], 2]]},
        {"sequence_bias": {"1": 2.0}},
        {"no_repeat_ngram_size": 2.5},
        {"encoder_repetition_penalty": -1.0},
        {"min_new_tokens": 3.5},
        {"min_length": "9"},
        {"exponential_decay_length_penalty": 4},
        {"forced_eos_token_id": "x"},
        {"begin_suppress_tokens": 4},
        {"typical_p": "0.5"},
        {"watermarking_config": WatermarkingConfig(greenlist_ratio=2.0)},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": "1.1"},
        {"repetition_penalty": float("nan")},
        {"eos_token_id": "x"},
        {"eos_token_id": [1, 2.5]},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_obeyed_is_refused_by_name(entries, monkeypatch):
    with pytest.raises(UnsupportedModel, match=rf"tiny: .*{next(iter(entries))}=.*generation_config.json") as error:
        model_of(monkeypatch, entries)
    assert "\n" not in str(error.value)


def test_a_drafts_own_entries_do_not_matter(text, monkeypatch):
    draft = load(FAMILY, "near")
    monkeypatch.setattr(draft.hf, "generation_config", GenerationConfig(num_beams=3, suppress_tokens=[1, 2]))
    model = SpecVLM(load(FAMILY, "target"), VideoLM(draft.hf, draft.family, name="near"))
    assert ask(model).token_ids == text
