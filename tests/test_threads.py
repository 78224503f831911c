"""One model serves any number of threads: every answer is about its own video, whoever else is asking."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
from conftest import load

from specvlm import SpecVLM
from specvlm.check import reference

THREADS = 4
LENGTH = 6
QUESTIONS = [
    (tiny.video(6, seed=1), "Describe the video."),
    (tiny.video(4, 90, 70, seed=2), "What happens?"),
    (tiny.video(8, 56, 56, 0.7, seed=3), "Two balls roll to the left."),
    (None, "Hello."),
]


@pytest.fixture
def _hasty():
    """Threads take turns after a few bytecodes, so that what they share is seen half done."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def answers(ask, times):
    """Ask every question `times` times from several threads at once; return the answers in order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, QUESTIONS * times))


@pytest.mark.usefixtures("_hasty")
def test_every_thread_gets_its_own_answer(pair):
    def ask(question):
        return pair.generate(*question, max_new_tokens=LENGTH, tree="paper", keep_ratio=0.5).token_ids

    expected = [ask(question) for question in QUESTIONS]
    assert len(set(expected)) == len(QUESTIONS)
    assert answers(ask, 3) == expected * 3


@pytest.mark.usefixtures("_hasty")
def test_the_oracle_disturbs_nobody(family):
    """generate() runs with its own attention and notes on the model, while others decode on the same weights."""
    model = SpecVLM(load(family, "target"))

    def ask(question):
        return model.generate(*question, max_new_tokens=LENGTH).token_ids

    def check(question):
        inputs = model.read(model.request(*question))
        return reference.generate(model.target, inputs, max_new_tokens=LENGTH).token_ids

    expected = [ask(question) for question in QUESTIONS]

    def either(numbered):
        number, question = numbered
        return (check if number % 2 else ask)(question)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(either, enumerate([question for question in QUESTIONS for _ in range(3)])))
    assert found == [ids for ids in expected for _ in range(3)]


def test_features_are_kept_and_merged_again(family):
    """A video that was seen is not encoded again: its features know nothing of the prompt."""
    target = load(family, "target")
    video = tiny.video(6)
    first = target.family.inputs(tiny.messages("video", "What?"), [video])
    (features,) = target.encode_visual(first)
    image = tiny.image(60, 90)
    messages = tiny.messages("image", "and", "video", "Describe the video.")
    second = target.family.inputs(messages, [image, video])
    (of_image,) = target.encode_visual(target.family.inputs(tiny.messages("image", "image"), [image, image]))[:1]
    if family != "llava_onevision":  # whose image alone is another picture than one of two
        expected = target.encode(second)
        found = target.merge(second, [of_image, features])
        assert (found.embeds - expected.embeds).abs().max() < 1e-5
        assert found.positions.equal(expected.positions)
    again = target.merge(first, [features])
    assert again.embeds.equal(target.encode(first).embeds)
