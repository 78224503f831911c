"""`specvlm verify`: what it compares, and that it sees a wrong engine."""

import json

import media
import pytest
import tiny
import torch
from conftest import load

from specvlm import ConfigError, SpecVLM
from specvlm.check import reference
from specvlm.check.lossless import WAYS, verify
from specvlm.cli import main as cli
from specvlm.runtime import attention
from specvlm.runtime.model import VideoLM
from specvlm.speculate.accept import Verifier

PROMPT = "What happens in the video?"
SHORT = {"max_new_tokens": 24}


def test_in_fp32_every_way_gives_the_same_ids(pair):
    proof = verify(pair, tiny.video(6), PROMPT, name="clip", **SHORT)
    assert proof.is_lossless
    assert [check.name for check in proof.found] == [
        "plain and generate()",
        *(f"plain and {way}" for way in WAYS),
        "sampled, plain and paper's tree",
    ]
    ids = pair.generate(tiny.video(6), PROMPT, drafter="none", **SHORT).token_ids
    assert proof.num_tokens == len(ids)
    assert proof.text().startswith(f"clip: {len(ids)} tokens, equal: plain and generate(), ")
    assert json.loads(json.dumps(proof.to_dict()))["lossless"] is True


def test_a_verifier_that_takes_what_is_drafted_is_seen(pair, monkeypatch):
    usual = Verifier.accept

    def accept(self, logits, draft):
        if len(draft):
            logits = logits.clone()
            logits[0, draft.tokens[0]] = logits.max() + 1  # the first drafted token always stands
        return usual(self, logits, draft)

    monkeypatch.setattr(Verifier, "accept", accept)
    proof = verify(SpecVLM(pair.target, load(pair.target.model_type, "far")), tiny.video(6), PROMPT, name="x", **SHORT)
    assert not proof.is_lossless
    found = {check.name: check for check in proof.found}
    assert found["plain and generate()"].is_equal
    for way in [way for way, settings in WAYS.items() if settings]:  # what is chosen may be to draft nothing
        check = found[f"plain and {way}"]
        assert not check.is_equal
        assert check.gap > 0
        assert f"plain and {way}: DIFFERS first at token {check.difference.index}, " in proof.text()
    assert not found["sampled, plain and paper's tree"].is_equal


def test_a_plain_decoding_that_is_not_transformers_is_seen(pair, monkeypatch):
    monkeypatch.setattr(pair.target.decoder, "scaling", 2 * pair.target.decoder.scaling)
    proof = verify(pair, tiny.video(6), PROMPT, **SHORT)
    assert [check.name for check in proof.found if not check.is_equal] == ["plain and generate()"]


def test_generate_runs_with_its_own_attention(pair, monkeypatch):
    def refuse(*args):
        raise AssertionError("our attention ran")

    inputs = pair.read(pair.request(tiny.video(6), PROMPT))
    ids = pair.generate(tiny.video(6), PROMPT, drafter="none", **SHORT).token_ids
    monkeypatch.setattr(attention, "masked", refuse)
    found = reference.generate(pair.target, inputs, **SHORT, has_logits=True)
    assert found.token_ids == ids
    assert [int(logits.argmax()) for logits in found.logits] == list(ids)
    assert len(found.arrivals) == len(ids)
    assert sorted(found.arrivals) == list(found.arrivals)


def test_in_half_precision_all_ways_are_judged_up_to_ties():
    parts = [
        VideoLM.from_pretrained(tiny.checkpoint("qwen2_5_vl", part), device="cpu", dtype="bfloat16")
        for part in ("target", "near")
    ]
    proof = verify(SpecVLM(*parts), tiny.video(4), PROMPT, max_new_tokens=12)
    assert parts[0].dtype == torch.bfloat16
    assert [tie.name for tie in proof.found] == ["generate()", "plain", *WAYS]
    assert all(tie.rounding > 0 for tie in proof.found)
    assert proof.is_lossless, proof.text()


@pytest.mark.parametrize("setting", [{"stop": ("a",)}, {"ignore_eos": True}, {"temperature": 0.5}, {"seed": 3}])
def test_what_the_proof_cannot_hold_for_is_refused(pair, setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.* is not allowed: greedy texts are compared"):
        verify(pair, tiny.video(4), **setting)


def test_without_a_draft_there_is_nothing_to_prove(pair):
    with pytest.raises(ConfigError, match="leaves nothing to compare"):
        verify(SpecVLM(pair.target), tiny.video(4))


@pytest.fixture
def argv(tmp_path):
    clip = media.make_video(tmp_path / "a.mp4", 8, rate=2)
    (tmp_path / "d.jsonl").write_text('{"id": "q", "video": "a.mp4", "prompt": "What?"}\n{"id": "r"}\n')
    pair = ["--target", tiny.checkpoint("qwen2_5_vl", "target"), "--draft", tiny.checkpoint("qwen2_5_vl", "near")]
    return ["verify", *pair, "--max-new-tokens", "8"], str(clip), str(tmp_path / "d.jsonl")


def test_the_command_proves_clips_or_data(argv, capsys):
    common, clip, data = argv
    assert cli.main([*common, clip, clip, "--prompt", "What?"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"{clip}: ") for line in out] == [True, True, False]
    assert out[-1] == "lossless (float32): yes, 2 of 2 questions"
    assert cli.main([*common, "--data", data, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["lossless"] is True
    assert [proof["name"] for proof in found["proofs"]] == ["q"]
    assert "d.jsonl, line 2" in captured.err


def test_a_video_that_cannot_be_read_and_a_part_of_one(argv, tmp_path, capsys):
    common, clip, data = argv
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    assert cli.main([*common, str(bad), clip, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [proof["lossless"] for proof in found["proofs"]] == [None, True]
    assert "bad.mp4" in found["proofs"][0]["failure"]
    (tmp_path / "d.jsonl").write_text('{"id": 7, "video": "a.mp4", "prompt": "What?", "start": 500}\n')
    assert cli.main([*common, "--data", data]) == 2
    out = capsys.readouterr().out
    assert "7: not answered, " in out
    assert out.endswith("lossless (float32): unknown, 0 of 1 questions, 1 not answered\n")


def test_a_difference_is_exit_status_1(argv, capsys, monkeypatch):
    monkeypatch.setattr("specvlm.check.lossless._generated", lambda *args: (1, 2))
    common, clip, _ = argv
    assert cli.main([*common, clip]) == 1
    out = capsys.readouterr().out
    assert "plain and generate(): DIFFERS first at token 0" in out
    assert out.endswith("lossless (float32): NO, 1 of 1 questions\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "What?"], "prompt='What?' is not allowed without a VIDEO"),
        (["x.mp4", "--limit", "2"], "limit=2 is not allowed beside a VIDEO"),
    ],
)
def test_a_bad_option_is_one_line(options, message, capsys):
    assert cli.main(["verify", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
