"""Questions about three of the bundled clips, each with the answer that its scene gives; scored word for word."""

from pathlib import Path

from specvlm.engine.pair import bundled

DATA = str(Path(__file__).with_name("questions.jsonl"))


def visual(doc):
    return [str(Path(bundled("clips"), doc["video"]))]


def text(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    """Return the first question; or, of a later round, lmms-eval's (visuals, text, is it over, answers, state)."""
    if round_idx is None:
        return doc["questions"][0]
    if round_idx == len(doc["questions"]):
        return None, None, True, previous_output, None
    return visual(doc), doc["questions"][round_idx], False, previous_output, None


def score(doc, results):
    """Return the share of right answers; a task of one round has asked the first question alone."""
    answers = results if isinstance(results[0], str) else results[0]
    pairs = zip(answers, doc["answers"], strict=False)
    return {"right": sum(answer == wanted for answer, wanted in pairs) / len(answers)}
