"""What `compare --ties` calls a tie."""

import pytest
import tiny
from conftest import load

from specvlm import ConfigError, SpecVLM
from specvlm.check.ties import _judge, _Text, ties

PROMPT = "What happens in the video?"


def short(pair):
    return SpecVLM(pair.target, pair.draft, pair.config.replace(max_new_tokens=40))


def test_in_fp32_nothing_differs(pair):
    found = ties(short(pair), tiny.video(6), PROMPT)
    assert [tie.name for tie in found.found] == ["plain", "speculative"]
    assert all(tie.difference is None for tie in found.found)
    assert all(value < 1e-3 for tie in found.found for value in (tie.rounding, tie.moved))
    assert found.is_lossless
    assert "lossless up to ties: yes" in found.table()


@pytest.mark.parametrize("settings", [{}, {"eager": True}, {"repetition_penalty": 1.6, "temperature": 1.0}])
def test_a_wrong_engine_is_no_tie_whatever_is_set(pair, monkeypatch, settings):
    """What is judged is the fused engine, by the logits that choose."""
    monkeypatch.setattr(pair.target.decoder, "scaling", 2 * pair.target.decoder.scaling)
    model = SpecVLM(pair.target, pair.draft, short(pair).config.replace(**settings))
    requests = []

    def request(*args, **kwargs):
        requests.append(SpecVLM.request(model, *args, **kwargs))
        return requests[-1]

    monkeypatch.setattr(model, "request", request)
    found = ties(model, tiny.video(6), PROMPT)
    _, *judged = requests  # the first read the video for all
    assert [made.config.run.eager for made in judged] == [True, True, False, False]
    assert {made.config.sampling.penalty for made in judged} == {1.0}
    assert not found.is_lossless
    assert "NO" in found.table()


def text(*choices):
    return _Text(tuple(token for token, _ in choices), tuple(logits for _, logits in choices))


@pytest.mark.parametrize(("gap", "is_tie"), [(0.01, True), (0.039, True), (0.041, False), (0.5, False)])
def test_a_gap_within_the_rounding_of_both_candidates_is_a_tie(gap, is_tie):
    model = SpecVLM(load("qwen2_5_vl", "target"))
    reference = text((5, {5: 2.0, 6: 1.0}), (7, {7: 1.0, 8: 1.0 - gap}))
    other = text((5, {5: 2.02, 6: 1.0}), (8, {7: 1.0, 8: 1.01}), (3, {3: 9.0}))
    tie = _judge(model, "plain", reference, other, 0.02)
    assert tie.difference.index == 1
    assert tie.gap == pytest.approx(gap)
    assert tie.other_gap == pytest.approx(-0.01)
    assert tie.moved == pytest.approx(max(0.02, abs(1.0 - gap - 1.01)))
    assert tie.is_tie == is_tie
    assert f"logit gap {gap:.3g}" in tie.line()


def test_a_candidate_out_of_reach_is_no_tie():
    model = SpecVLM(load("qwen2_5_vl", "target"))
    tie = _judge(model, "plain", text((5, {5: 2.0, 6: 1.0})), text((9, {9: 3.0, 5: 1.0})), 1.0)
    assert tie.gap is None
    assert not tie.is_tie
    assert "beyond the best eight" in tie.line()


def test_a_pair_is_needed():
    with pytest.raises(ConfigError, match="give --draft"):
        ties(SpecVLM(load("qwen2_5_vl", "target")), tiny.video(6))
