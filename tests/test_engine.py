"""The engine on tiny random models of every family: the tokens of plain decoding and of transformers' generate()."""

import itertools
import math
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import load

from specvlm import ConfigError, SpecVLM, UnsupportedModel, prune
from specvlm.check import reference
from specvlm.core import tree
from specvlm.core.clock import Seconds
from specvlm.core.errors import CapacityError
from specvlm.core.rows import ancestors
from specvlm.engine.api import _first_score_row
from specvlm.runtime.model import VideoLM
from specvlm.speculate import accept, growth, policy
from specvlm.speculate.drafters import DRAFTERS, Context, Drafter, create

PROMPT = "What happens in the video? Two balls follow the red one to the left."
LENGTH = 24


def ask(model, **settings):
    """Ask with a static tree, so that what is drafted does not depend on how fast this machine is just now."""
    return model.generate(tiny.video(6), PROMPT, **{"max_new_tokens": LENGTH, "tree": "paper", **settings})


def ask_unpruned(model, **settings):
    """With the target as its own draft every block is accepted whole, so that a text ends inside one."""
    return ask(model, keep_ratio=1.0, **settings)


def transformers_ids(model, source=None, prompt=PROMPT, **options):
    """What transformers' own generate() answers, given the same inputs and positions."""
    source = tiny.video(6) if source is None else source
    inputs = model.prefill(model.request(source, prompt)).inputs
    return reference.generate(model.target, inputs, **{"max_new_tokens": LENGTH, **options}).token_ids


def test_greedy_ids_are_those_of_plain_decoding_and_of_transformers(pair):
    plain = ask(pair, drafter="none")
    assert len(set(plain.token_ids)) > LENGTH // 2  # a text of one repeated token would prove little
    assert plain.token_ids == transformers_ids(pair)
    accepted = 0
    kept = [("verifier", 1.0), *((pruner, 0.1) for pruner in prune.PRUNERS)]  # at 1.0 no pruner is asked
    for (pruner, keep_ratio), spec in itertools.product(kept, ("paper", "chain:4", "0,1,2,00")):
        answer = ask(pair, pruner=pruner, keep_ratio=keep_ratio, tree=spec)
        assert answer.token_ids == plain.token_ids, (pruner, keep_ratio, spec)
        assert answer.text == plain.text
        accepted += answer.speculation.accepted_tokens
    assert accepted > 0


def test_a_small_draft_of_other_width_and_vocabulary_is_lossless(family):
    model = SpecVLM(load(family, "target"), load(family, "draft"))
    assert ask(model).token_ids == ask(model, drafter="none").token_ids


def test_the_target_as_its_own_draft_accepts_the_whole_tree(family):
    target = load(family, "target")
    model = SpecVLM(target, target)
    answer = ask(model, keep_ratio=1.0, max_new_tokens=1 + 6 * 4)
    assert answer.speculation.mean_accepted_length == 5.0
    assert answer.speculation.rounds == 4
    assert answer.speculation.target_passes == 5
    assert answer.speculation.accepted_per_depth == [4] * 5
    assert answer.speculation.drafted_tokens == 4 * 25


@pytest.mark.parametrize("length", range(1, 10))
def test_max_new_tokens_is_exact(length):
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "target"))
    whole, answer = ask_unpruned(model), ask_unpruned(model, max_new_tokens=length)
    assert answer.token_ids == whole.token_ids[:length]
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == length


def assert_counted(answer):
    """Every token is a pass's own or an accepted one that stands in the text; the last pass's own may be cut off."""
    account = answer.speculation
    assert account.accepted_tokens == sum(account.accepted_per_depth)
    missing = account.target_passes + account.accepted_tokens - answer.usage.completion_tokens
    assert missing in (0, 1)
    assert len(answer.token_ids) == answer.usage.completion_tokens


@pytest.mark.parametrize("place", range(8))
def test_any_eos_id_ends_the_text_inside_an_accepted_block(place, monkeypatch):
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "target"))
    whole = ask_unpruned(model)
    eos = whole.token_ids[place]
    monkeypatch.setattr(model.target, "eos_ids", frozenset({eos, 10**6}))
    answer, plain = ask_unpruned(model), ask_unpruned(model, drafter="none")
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(eos) + 1] == plain.token_ids
    assert answer.finish_reason == "stop"
    assert answer.text == plain.text
    assert_counted(answer)
    request = model.request(tiny.video(6), PROMPT, max_new_tokens=LENGTH, keep_ratio=1.0, tree="paper")
    list(model.rounds(request))
    assert request.speculation == answer.speculation
    assert ask_unpruned(model, ignore_eos=True).token_ids == whole.token_ids


def test_a_stop_string_is_cut_off_wherever_it_falls():
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "target"))
    whole = ask_unpruned(model)
    stops = {whole.text[i : i + 3] for i in range(2, len(whole.text) - 3, 4)}
    for stop in sorted(stop for stop in stops if "\ufffd" not in stop):
        answer = ask_unpruned(model, stop=(stop, "never there"))
        plain = ask_unpruned(model, stop=(stop,), drafter="none")
        assert answer.text == whole.text[: whole.text.index(stop)] == plain.text
        assert answer.token_ids == plain.token_ids == whole.token_ids[: len(plain.token_ids)]
        assert answer.finish_reason == "stop"
        assert_counted(answer)


def test_two_requests_may_interleave_on_one_model(pair):
    questions = (PROMPT, "Describe the image.")
    alone = [pair.generate(tiny.video(6), question, max_new_tokens=LENGTH).token_ids for question in questions]
    streams = [pair.stream(tiny.video(6), question, max_new_tokens=LENGTH) for question in questions]
    together = [[], []]
    for chunks in itertools.zip_longest(*streams):
        for tokens, chunk in zip(together, chunks, strict=True):
            tokens += chunk.token_ids if chunk else ()
    assert [tuple(tokens) for tokens in together] == alone


def test_streamed_pieces_are_the_whole_text(pair):
    chunks = list(pair.stream(tiny.video(6), PROMPT, max_new_tokens=LENGTH, tree="paper"))
    whole = ask(pair)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert len(chunks) == whole.speculation.target_passes


def test_repetition_penalty_is_transformers(pair):
    expected = transformers_ids(pair, repetition_penalty=1.4)
    assert expected != transformers_ids(pair)
    answer = ask(pair, repetition_penalty=1.4, keep_ratio=1.0)
    assert answer.token_ids == expected
    assert answer.speculation.accepted_tokens > 0


def test_the_checkpoints_own_repetition_penalty_is_in_force(pair, monkeypatch):
    monkeypatch.setattr(pair.target.hf.generation_config, "repetition_penalty", 1.4)
    model = SpecVLM(type(pair.target)(pair.target.hf, pair.target.family), pair.draft)
    answer = ask(model)
    assert answer.config.sampling.repetition_penalty == 1.4
    assert answer.token_ids == transformers_ids(model) != ask(model, repetition_penalty=1.0).token_ids


def test_what_was_left_to_chance_is_in_the_account():
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    first = ask(model, temperature=1.0)
    again = ask(model, temperature=1.0, seed=first.config.sampling.seed)
    assert first.token_ids == again.token_ids != ask(model, temperature=1.0).token_ids
    assert first.config.video.fps == 2.0


def test_a_request_runs_once():
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    request = model.request(tiny.video(6), PROMPT, max_new_tokens=4)
    model.generate_request(request)
    with pytest.raises(ValueError, match="runs once"):
        model.generate_request(request)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, "content=None"),
        ({"content": "hi"}, "a role and a content"),
        ({"role": "user", "content": ["hi"]}, "a message part is an object with a type"),
        ({"role": "user", "content": [{"words": "hi"}]}, "content\\[0\\]"),
        ({"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, "part of type 'audio'"),
        ({"role": "user", "content": [{"type": "video"}]}, "names no video"),
    ],
)
def test_a_malformed_message_is_named(message, words):
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    with pytest.raises(ConfigError, match=words):
        model.request([message])


@pytest.mark.parametrize("key", ["video", "path", "url"])
def test_a_part_names_its_source_in_any_usual_way(key):
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    content = [{"type": "video", key: tiny.video(6)}, {"type": "text", "text": PROMPT}]
    answer = model.generate([{"role": "user", "content": content}], max_new_tokens=LENGTH)
    assert answer.token_ids == ask(model).token_ids


def test_text_without_a_video(pair):
    pair.generate(tiny.video(6), PROMPT, max_new_tokens=4)  # leaves M-RoPE deltas behind on the module
    answer = pair.generate(None, PROMPT, max_new_tokens=LENGTH)
    assert answer.usage.visual_tokens == answer.usage.kept_visual_tokens == 0
    request = pair.request(None, PROMPT)
    assert answer.token_ids == transformers_ids(pair, request.messages, None)


def test_several_videos_and_images_over_several_turns(pair):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": tiny.video(4, seed=1)},
                {"type": "text", "text": "and then"},
                {"type": "image", "image": tiny.image(seed=2)},
                {"type": "text", "text": "What happens?"},
            ],
        },
        {"role": "assistant", "content": "The red ball rolls."},
        {
            "role": "user",
            "content": [{"type": "video", "video": tiny.video(4, seed=3)}, {"type": "text", "text": "And here?"}],
        },
    ]
    plain = pair.generate(messages, max_new_tokens=LENGTH, drafter="none")
    for settings in ({}, {"per_visual": True, "keep_ratio": 0.3}, {"score_rows": "last_turn"}):
        answer = pair.generate(messages, max_new_tokens=LENGTH, tree="paper", **settings)
        assert answer.token_ids == plain.token_ids
        assert 0 < answer.usage.kept_visual_tokens < answer.usage.visual_tokens
    assert plain.token_ids == transformers_ids(pair, messages, None)


@pytest.mark.parametrize("eager", [False, True])
def test_scores_are_the_eager_attention_of_the_text_rows(pair, eager):
    """Oracle: transformers' own eager attention maps of the whole prompt, of all layers and rows or of some."""
    request = pair.request(tiny.video(6), PROMPT, eager=eager)
    start = pair.prefill(request)
    hf, prompt = pair.target.hf, start.prompt
    hf.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.inference_mode():
            out = hf(
                input_ids=start.inputs.input_ids[None],
                **start.inputs.model_kwargs,
                position_ids=prompt.positions,
                output_attentions=True,
                use_cache=False,
            )
    finally:
        hf.set_attn_implementation({"text_config": "specvlm"})
    maps = torch.stack(out.attentions)[:, 0]  # [layers, heads, S, S]
    first = int(prompt.visual_index[-1]) + 1
    expected = maps[:, :, first:, :].mean((0, 1, 2))[prompt.visual_index]
    torch.testing.assert_close(start.scores, expected, rtol=0, atol=1e-6)
    assert start.scores.sum() > 0.01
    for settings, layers, row in (
        ({"score_layers": "0"}, [0], first),
        ({"score_layers": "last"}, [-1], first),
        ({"score_layers": "-1,0", "score_rows": "last"}, [0, -1], len(prompt) - 1),
    ):
        found = pair.prefill(pair.request(tiny.video(6), PROMPT, eager=eager, **settings)).scores
        expected = maps[layers][:, :, row:, :].mean((0, 1, 2))[prompt.visual_index]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(found, start.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(start.logits, out.logits[0, -1], rtol=0, atol=1e-4)


def test_the_last_turn_can_score_alone(pair):
    messages = [
        *tiny.messages("video", "What happens?"),
        {"role": "assistant", "content": "The red ball rolls."},
        {"role": "user", "content": "And then?"},
    ]
    messages[0]["content"][0]["video"] = tiny.video(6)
    ids = pair.prefill(pair.request(messages)).inputs.input_ids.tolist()
    start = pair.prefill(pair.request(messages, score_rows="last_turn"))
    config = pair.request(messages, score_rows="last_turn").config
    first = _first_score_row(start.prompt, pair.target, config)
    text = pair.target.tokenizer.decode(ids[first:])
    assert text.startswith("<|im_start|>user\nAnd then?")
    everything = pair.prefill(pair.request(messages))
    assert not torch.allclose(everything.scores, start.scores)
    torch.testing.assert_close(everything.logits, start.logits, rtol=0, atol=1e-4)


def test_a_layer_that_is_not_there_cannot_score(pair):
    with pytest.raises(ConfigError, match=r"score_layers='0,9' is not allowed \(9\): layers 0 to"):
        pair.request(None, score_layers="0,9")


def test_repacked_positions_are_counted_anew_and_change_the_draft_alone(pair, monkeypatch):
    keep = torch.tensor([1, 4, 5])
    prompt = pair.prefill(pair.request(tiny.video(6), PROMPT)).prompt.select(keep)
    packed = prompt.repacked()
    assert packed.next_position == len(prompt)
    for positions in packed.positions.reshape(-1, len(prompt)):
        assert positions.tolist() == list(range(len(prompt)))
    plain = pair.generate(tiny.video(6), PROMPT, max_new_tokens=LENGTH, drafter="none")
    starts, start = [], VideoLM.start
    monkeypatch.setattr(VideoLM, "start", lambda *args, **kwargs: starts.append(args[1]) or start(*args, **kwargs))
    for positions in ("original", "repacked"):
        answer = pair.generate(tiny.video(6), PROMPT, max_new_tokens=LENGTH, positions=positions, tree="chain:5")
        assert answer.token_ids == plain.token_ids
    target, original, other_target, repacked = starts
    assert torch.equal(target.positions, other_target.positions)
    assert original.next_position == target.next_position > len(original)
    assert repacked.next_position == len(repacked) == len(original)
    with pytest.raises(ConfigError, match="positions='repacked' is not allowed for self-drafting"):
        pair.request(None, positions="repacked", drafter="self")


def test_a_tree_pass_gives_what_its_paths_give_alone(pair):
    """Every row of the paper's tree, also after a rollback and a commit, against its path run as plain text."""
    start = pair.prefill(pair.request(tiny.video(6), PROMPT, drafter="none"))
    topology = tree.parse("paper")
    tokens = torch.randint(0, 250, (26,), generator=torch.Generator().manual_seed(0))
    parents = [-1, *(parent + 1 for parent in topology.parents)]
    start.session.step(tokens.flip(0), parents)
    start.session.keep([0, 1, 5])
    start.session.rollback()
    logits = start.session.step(tokens, parents)
    sees = ancestors(parents)
    fresh = pair.prefill(pair.request(tiny.video(6), PROMPT, drafter="none")).session
    for row in range(26):
        path = tokens[sees[row]]
        alone = fresh.step(path, range(-1, len(path) - 1))
        fresh.rollback()
        torch.testing.assert_close(logits[row], alone[-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_the_drafted_tree_is_the_drafts_own_ranking_on_the_kept_tokens(pair, penalty):
    """Every node against the draft run along its path as plain text, on a prompt pruned by hand."""
    start = pair.prefill(pair.request(tiny.video(6), PROMPT, drafter="none"))
    keep = torch.arange(0, start.prompt.num_visual, 5)
    config = pair.request(None, repetition_penalty=penalty).config
    drafter = create(config.draft, pair.draft, context(pair, start, keep, config))
    pruned = pair.draft.encode(start.inputs).select(keep)
    session, _, _ = pair.draft.start(pruned, 64)
    known, topology = [11], tree.parse("paper")
    for path in ((1, 7, 19), (0, 4, 12, 20), ()):  # a path with a leaf that never ran, one without, none at all
        draft = drafter.propose(known[-1], topology)
        tokens, sees = draft.tokens, ancestors(topology.parents)
        assert tuple(draft.parents.tolist()) == topology.parents
        for node, parent in enumerate(topology.parents):
            words = known + tokens[sees[parent]].tolist() if parent >= 0 else known
            logits = next_logits(session, pruned, words, penalty)
            assert tokens[node] == logits.topk(4).indices[topology.ranks[node]]
        words = tuple(tokens[list(path)].tolist())
        observed = drafter.commit(accept.Accepted(path, (*words, 17), tuple(draft.notes.tolist())))
        hits = [topology.ranks[node] for node in path]
        run = [node for node in path if node in topology.parents]  # only rows that were run had candidates
        assert [seen.depth for seen in observed] == list(range(1, len(run) + 2))
        assert [seen.hit for seen in observed][: len(path)] == hits
        known += [*words, 17]


def context(pair, start, keep, config):
    return Context(
        pair.target, start.session, start.inputs, start.prompt, keep, start.scores, config.sampling, config.prune
    )


def next_logits(session, prompt, words, penalty=1.0):
    """The logits after words behind the known text, which stays as it is."""
    logits = session.step(torch.tensor(words), range(-1, len(words) - 1))[-1]
    session.keep(())
    seen = accept.seen_in(torch.cat([prompt.input_ids, torch.tensor(words)]), logits.shape[0])
    return accept.penalise(logits, seen, penalty)


@pytest.mark.parametrize("spec", ["dynamic:7:3", "dynamic:25:5", "dynamic:4:4", "dynamic:60:6"])
def test_a_dynamic_tree_holds_the_likeliest_paths(spec):
    """Against the whole tree of four candidates a row, by hand: the best nodes by the product of the draft's odds."""
    pair = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    start = pair.prefill(pair.request(tiny.video(6), PROMPT, drafter="none"))
    keep = torch.arange(0, start.prompt.num_visual, 5)
    config = pair.request(None, tree=spec).config
    asked, shape = context(pair, start, keep, config), tree.parse(spec)
    drafter = create(config.draft, pair.draft, asked)
    worth = torch.tensor(asked.acceptance.log_worth()).view(tree.NUM_RANKS, -1)
    pruned = pair.draft.encode(start.inputs).select(keep)
    session, _, _ = pair.draft.start(pruned, 64)
    draft = drafter.propose(11, shape)
    found, running = {}, [((), 0.0)]  # path of tokens -> score; the rows of a level
    for rows in shape.passes:
        level = {}
        for path, score in running[:rows]:
            probs = next_logits(session, pruned, [11, *path]).softmax(-1)
            for rank, token in enumerate(probs.topk(4).indices.tolist()):
                prob = float(probs[token])
                among_equals = growth.TIE_BREAK * max(math.log(prob), growth.LEAST_LOG_PROB)
                place = sum(prob <= edge for edge in policy.BIN_EDGES)
                level[(*path, token)] = score + float(worth[rank, place]) + among_equals
        found |= level
        running = sorted(level.items(), key=lambda item: -item[1])
    wanted = sorted(found.values(), reverse=True)[: shape.nodes]
    sees, tokens = ancestors(draft.parents.tolist()), draft.tokens
    paths = [tuple(tokens[row].tolist()) for row in sees]
    assert len(set(paths)) == shape.nodes
    torch.testing.assert_close(
        torch.tensor(sorted((found[path] for path in paths), reverse=True)), torch.tensor(wanted), rtol=0, atol=1e-4
    )
    assert torch.equal(draft.rows.sees[1:, 1:], sees)
    assert draft.rows.sees[:, 0].all()
    assert draft.rows.depths.tolist() == [1, *(sees.sum(1) + 1).tolist()]


DRAFTS = (
    {"drafter": "model", "policy": "fixed"},
    {"drafter": "model", "policy": "auto"},
    {"drafter": "model", "policy": "fixed", "tree": "dynamic:7:3", "lookup_tokens": 5},
    {"drafter": "model", "tree": "paper", "lookup_tokens": 3},
    {"drafter": "self", "policy": "fixed"},
    {"drafter": "self", "policy": "fixed", "keep_ratio": 0.5, "refresh": 2},
    {"drafter": "self", "tree": "paper", "keep_ratio": 1.0, "lookup_tokens": 4},
    {"drafter": "lookup"},
    {"drafter": "lookup", "policy": "fixed"},
)
SAMPLINGS = (
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 4},
)


@pytest.mark.filterwarnings("ignore::specvlm.speculate.drafters.DraftWarning")
@pytest.mark.parametrize(
    "sampling",
    [pytest.param(one, marks=[pytest.mark.slow] if one in SAMPLINGS[1:3] else []) for one in SAMPLINGS],
    ids=["greedy", "penalty", "sampled", "filtered"],
)
def test_no_drafter_changes_the_text(pair, sampling):
    """Every drafter in every way of sampling: the very tokens of plain decoding with the same seed."""
    words = "The red ball rolls, the red ball rolls, the red ball"
    plain = pair.generate(tiny.video(6), words, max_new_tokens=LENGTH, drafter="none", **sampling)
    accepted = {}
    for settings in DRAFTS:
        answer = pair.generate(tiny.video(6), words, max_new_tokens=LENGTH, **settings, **sampling)
        assert answer.token_ids == plain.token_ids, settings
        accepted[settings["drafter"]] = accepted.get(settings["drafter"], 0) + answer.speculation.accepted_tokens
    assert accepted["model"] > 0
    assert accepted["self"] > 0


def test_sampling_with_the_target_as_its_own_draft_accepts_every_first_choice(pair):
    """The draft adds the target's own noise: where the two distributions are equal, so are the choices."""
    model = SpecVLM(pair.target, pair.target)
    answer = ask(model, temperature=1.0, seed=2, keep_ratio=1.0, tree="chain:4", max_new_tokens=21)
    assert answer.speculation.accepted_tokens == 16
    assert answer.speculation.rounds == 4


def test_a_drafter_that_ignores_its_budget_cannot_lengthen_the_text(pair, monkeypatch):
    whole = ask(pair, drafter="none").token_ids

    class Greedy(DRAFTERS["none"]):
        def propose(self, token, topology):
            place = whole.index(token) + 1
            return accept.Draft.of(whole[place : place + 5], range(-1, len(whole[place:][:5]) - 1))

    monkeypatch.setitem(DRAFTERS, "greedy", Greedy)
    answer = ask(pair, drafter="greedy", max_new_tokens=3)
    assert answer.token_ids == whole[:3]
    assert answer.finish_reason == "length"


def test_sampling_end_to_end_has_the_targets_law():
    """Chi-square over the first three tokens (27 of them at top_k 3), 800 seeds.

    The law is exact, from the target's logits. The statistic of 26 degrees of freedom exceeds 85 with probability 3e-8.
    """
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    settings = {"temperature": 1.5, "top_k": 3, "max_new_tokens": 3, "tree": "0,1,00", "keep_ratio": 1.0}
    start = model.prefill(model.request(tiny.video(2), PROMPT, **settings))
    sampling = model.request(None, **settings).config.sampling

    def follow(path):
        start.session.rollback()
        logits = start.session.step(torch.tensor(path), range(-1, len(path) - 1))[-1:] if path else start.logits[None]
        return accept.logits_to_probs(logits, sampling)[0]

    law = {}
    for one in follow([]).nonzero().flatten().tolist():
        for two in follow([one]).nonzero().flatten().tolist():
            for three in follow([one, two]).nonzero().flatten().tolist():
                law[one, two, three] = (follow([])[one] * follow([one])[two] * follow([one, two])[three]).item()
    assert len(law) == 27
    counts, accepted, seeds = dict.fromkeys(law, 0), 0, 800
    for seed in range(seeds):
        start.session.rollback()
        request = model.request(None, **settings, seed=seed)
        counts[tuple(token for latest in model.decode(request, start) for token in latest.token_ids)] += 1
        accepted += request.speculation.accepted_tokens
    statistic = sum((counts[text] - seeds * p) ** 2 / (seeds * p) for text, p in law.items())
    assert statistic < 85
    assert accepted > 250  # the law was kept by accepting, not by rejecting everything


def test_calls_may_stand_inside_inference_mode_and_outside(pair):
    with torch.inference_mode():
        inside = ask(pair, repetition_penalty=1.4)
    assert ask(pair, repetition_penalty=1.4).token_ids == inside.token_ids


def test_a_prefill_says_what_it_has_no_room_for(pair):
    start = pair.prefill(pair.request(tiny.video(2), PROMPT, max_new_tokens=4))
    with pytest.raises(CapacityError, match="no room for max_new_tokens=4000: prefill again"):
        next(pair.decode(pair.request(None, PROMPT, max_new_tokens=4000), start))


def test_a_draft_of_too_many_nodes_is_named(pair, monkeypatch):
    class Wide(Drafter):
        def propose(self, token, topology):
            return accept.Draft.of([0] * 200, [-1] * 200)

    monkeypatch.setitem(DRAFTERS, "wide", Wide)
    with pytest.raises(ConfigError, match="200 nodes are more than 127"):
        ask(pair, drafter="wide", tree="chain:1")


def test_a_seed_repeats_a_sampled_text(pair):
    settings = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "tree": "paper"}
    first, again, other = (ask(pair, seed=seed, **settings).token_ids for seed in (1, 1, 2))
    assert first == again != other


def test_the_account_adds_up(pair):
    answer = ask(pair, keep_ratio=0.25)
    account, usage = answer.speculation, answer.usage
    assert account.accepted_tokens == sum(account.accepted_per_depth)
    assert account.mean_accepted_length == account.accepted_tokens / account.rounds
    assert account.acceptance_length == account.mean_accepted_length + 1
    is_cut = account.target_passes + account.accepted_tokens - LENGTH  # a bonus token beyond the length is none
    assert is_cut in (0, 1)
    assert usage.completion_tokens == LENGTH
    assert usage.kept_visual_tokens == round(0.25 * usage.visual_tokens)
    seconds = answer.seconds.to_dict()
    assert all(value > 0 for stage, value in seconds.items() if stage not in ("calibrate", "capture"))
    assert seconds["time_to_first_token"] < seconds["total"]
    stages = ("read", "encode", "prefill", "prune", "draft_prefill", "decode")
    assert sum(seconds[stage] for stage in stages) <= seconds["total"]


def test_a_stage_within_a_stage_is_counted_once(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("specvlm.core.clock.time.perf_counter", lambda: next(clock))
    seconds = Seconds()
    with seconds.stage("decode"):  # from 1
        with seconds.stage("capture"):  # from 2 to 3
            pass
        with seconds.stage("capture"):  # from 4 to 5
            pass
    with seconds.stage("decode"):  # from 7 to 8
        pass
    assert (seconds["capture"], seconds["decode"]) == (2, 6 - 1 - 2 + 1)


def test_a_prompt_beyond_the_context_is_refused(pair):
    with pytest.raises(CapacityError, match=r"exceed the context of 4096 tokens .* \(max_new_tokens=\d+ would fit\)"):
        ask(pair, max_new_tokens=4096)


def test_a_draft_that_sees_videos_differently_is_refused(family, monkeypatch):
    target, draft = load(family, "target"), load(family, "draft")
    settings = {**draft.family.settings, "video": {**draft.family.settings["video"], "image_mean": (0.1, 0.2, 0.3)}}
    monkeypatch.setattr(draft.family, "settings", settings)
    with pytest.raises(UnsupportedModel, match=r"video.image_mean is .* and \(0.1, 0.2, 0.3\)"):
        SpecVLM(target, draft)
    settings["video"]["image_mean"] = target.family.settings["video"]["image_mean"]
    settings["video"]["size"] = {"shortest_edge": 1, "longest_edge": 2}  # bounds are the target's affair
    SpecVLM(target, draft)


def test_a_hub_ids_processor_files_are_read(tmp_path):
    """A checkpoint in an offline Hugging Face cache has the settings of its own files, not the classes' defaults."""
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / ("0123" * 10)  # a commit
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny.checkpoint("qwen2_5_vl", "draft"), snapshot)
    (tmp_path / "hub" / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--acme--tiny" / "refs" / "main").write_text("0123" * 10)
    known = "from specvlm.runtime.model import VideoLM"
    code = f"{known}; print(VideoLM.from_pretrained('acme/tiny').family.settings['video'])"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(load("qwen2_5_vl", "draft").family.settings["video"])


def test_a_draft_of_another_family_or_tokenizer_is_refused(monkeypatch):
    target, other = load("qwen2_5_vl", "target"), load("qwen2_vl", "draft")
    with pytest.raises(UnsupportedModel, match=r"is a qwen2_vl, target .* a qwen2_5_vl"):
        SpecVLM(target, other)
    draft = load("qwen2_5_vl", "draft")
    vocabulary = dict(draft.tokenizer.get_vocab())
    word = next(token for token, index in vocabulary.items() if index == 7)
    vocabulary["other"] = vocabulary.pop(word)
    monkeypatch.setattr(draft.tokenizer, "get_vocab", lambda: vocabulary)
    with pytest.raises(UnsupportedModel, match=r"token 7 is .* and 'other'"):
        SpecVLM(target, draft)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_ration": 0.1}, "unknown setting 'keep_ration'"),
        ({"keep_ratio": 0}, "keep_ratio=0"),
        ({"keep_ratio": 2}, "keep_ratio=2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"drafter": "oracle"}, "known are lookup, model, none, self"),
        ({"pruner": "best"}, "known are attention"),
        ({"tree": "chain:x"}, "chain:N"),
        ({"tree": "dynamic:5"}, "dynamic:NODES:DEPTH"),
        ({"tree": "dynamic:3:4"}, "to the nodes"),
        ({"policy": "fast"}, "policy='fast' is not allowed: known are auto, fixed"),
        ({"lookup_tokens": -1}, "from 0 to 32"),
        ({"refresh": -1}, "0 or more rounds"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": 1e-40}, "temperature=1e-40"),
        ({"seed": 10**20}, "2\\^63"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not allowed: it must be int"),
        ({"max_new_tokens": True}, "it must be int"),
        ({"keep_ratio": "0.1"}, "it must be float"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"focus": 1.5}, "focus=1.5"),
    ],
)
def test_a_bad_setting_is_named_before_any_work(settings, words):
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "draft"))
    with pytest.raises(ConfigError, match=words):
        model.request("no such file.mp4", **settings)
