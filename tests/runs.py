"""Journals of quality runs that nobody ran: seeded, with figures as real runs have them."""

import json
import random

from PIL import Image, ImageDraw

from specvlm_bench import journal

DEPTH, NODES, LENGTH, EOS = 5, 25, 70, 1
WORDS = (
    "the", "a", "red", "blue", "green", "square", "circle", "moves", "left", "right", "up",
    "down", "then", "it", "stops", "behind", "over", "under", "and", "turns",
)  # fmt: skip
PRUNERS = {"verifier": 0.02, "uniform": 0.07, "random": 0.1}  # what a tenth of the tokens costs in acceptance
METHODS = {
    "plain": {"drafter": "none"},
    "generate": {},
    "chain": {"drafter": "model", "tree": "chain:5", "policy": "fixed", "pruner": "none"},
    "tree": {"drafter": "model", "tree": "paper", "policy": "fixed", "pruner": "none"},
    **{
        f"{pruner}@{ratio}": {
            "drafter": "model", "tree": "paper", "policy": "fixed", "pruner": pruner, "keep_ratio": ratio
        }
        for pruner in PRUNERS
        for ratio in (0.5, 0.1, 0.05)
    },
    "auto": {"drafter": "model", "tree": "dynamic", "policy": "auto", "pruner": "verifier", "keep_ratio": 0.1},
}  # fmt: skip
FEW = {name: METHODS[name] for name in ("plain", "tree", "verifier@0.1")}
EIGHT = {name: METHODS[name] for name in list(METHODS)[:8]}
MANY = METHODS | {f"self-{name}": {**METHODS[name], "drafter": "self"} for name in list(METHODS)[2:]} | {
    f"lookup-{count}": {"drafter": "lookup", "lookup_tokens": count} for count in range(1, 7)
}  # fmt: skip


def origin(methods, samples, **changes):
    versions = {"python": "3.11.9", "specvlm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "av": "18.1.0"}
    return {
        "kind": "run", "command": "specvlm bench quality --data clips --out run", "commit": "c0ffee1234",
        "data": "bundled", "versions": versions, "started": "2026-11-22T18:30:00Z", "preset": None,
        "target": "target", "draft": "draft",
        "device": "cpu", "gpu": None, "cores": 2, "dtype": "float32", "draft_quant": None,
        "settings": {"max_new_tokens": LENGTH}, "samples": samples, "seed": 0, "is_timed": True, "methods": methods,
    } | changes  # fmt: skip


def answer(sample, method, *, video=None, ids=(5, 6, EOS), drafted=(0,), tokens=(3,), ms=10.0, first_s=1.0, **changes):
    """Return an answer's line; what follows from its ids, passes and times is worked out here."""
    rounds = sum(count > 0 for count in drafted)
    accepted = [came - 1 for came, nodes in zip(tokens, drafted, strict=True) if nodes]
    mat = sum(accepted) / rounds if rounds else 0.0
    decode = ms * (len(ids) - 1) / 1e3
    return {
        "kind": "answer", "sample": sample, "video": video or f"{sample}.mp4", "prompt": "What happens?",
        "method": method, "place": 0, "text": " ".join(WORDS[token % len(WORDS)] for token in ids if token != EOS),
        "token_ids": list(ids), "finish_reason": "stop" if ids[-1] == EOS else "length",
        "new_tokens": len(ids) - (ids[-1] == EOS), "new_tokens_with_eos": len(ids), "prompt_tokens": 700,
        "visual_tokens": 576, "kept_visual_tokens": 58, "target_passes": len(tokens), "rounds": rounds,
        "drafted_tokens": sum(drafted), "accepted_tokens": sum(accepted), "mean_accepted_length": mat,
        "acceptance_length": 1 + mat,
        "accepted_per_depth": [sum(one > depth for one in accepted) for depth in range(max(accepted, default=0))],
        "drafted_per_pass": list(drafted), "tokens_per_pass": list(tokens),
        "seconds": {"read": 0.2 * first_s, "encode": 0.3 * first_s, "prefill": 0.5 * first_s,
                    "prune": 0.01 * (rounds > 0), "draft_prefill": 0.1 * (rounds > 0), "calibrate": 0.0, "capture": 0.0,
                    "decode": decode - 0.11 * (rounds > 0), "time_to_first_token": first_s,
                    "total": first_s + decode},
        "ms_per_token": ms, "peak_memory_bytes": 3 << 29,
    } | changes  # fmt: skip


def difference(sample, method, index, plain_token, other_token, gap):
    return {
        "kind": "difference", "sample": sample, "method": method, "index": index, "plain_token": plain_token,
        "other_token": other_token, "plain_text": f" {WORDS[plain_token % len(WORDS)]}",
        "other_text": f" {WORDS[other_token % len(WORDS)]}", "gap": gap,
    }  # fmt: skip


def put(directory, *lines):
    """Write a journal; the first line is the run's."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / journal.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return directory


def hardness(settings):
    """Return what a method's settings cost in acceptance."""
    if settings["drafter"] == "lookup":
        return 0.5 - 0.02 * settings["lookup_tokens"]
    cost = PRUNERS.get(settings.get("pruner"), 0.0) * (0.1 / settings.get("keep_ratio", 1.0)) ** 0.5
    return cost + 0.06 * (settings["drafter"] == "self") + 0.03 * (settings.get("tree") == "chain:5")


def passes(dice, length, settings, ease):
    """Return (drafted, tokens) of each pass of an answer of `length` tokens."""
    drafted, tokens = [0], [1]
    while sum(tokens) < length:
        if settings.get("drafter", "none") == "none" or (settings.get("policy") == "auto" and dice.random() < 0.1):
            drafted, tokens = [*drafted, 0], [*tokens, 1]
            continue
        rate = ease - hardness(settings) - 0.002 * sum(tokens)  # it fades over the text
        accepted = next((depth for depth in range(DEPTH) if dice.random() > rate), DEPTH)
        drafted, tokens = [*drafted, NODES], [*tokens, min(accepted + 1, length - sum(tokens))]
    return drafted, tokens


def lines_of(sample, methods, dice):
    """Return a sample's answers: videos hold two samples each, and the longer ones take longer."""
    clip, length = sample // 2, LENGTH - dice.randrange(20)
    video = random.Random(clip)
    ease, visual = 0.97 - 0.12 * video.random() - 0.03 * dice.random(), 192 * video.randint(1, 8)
    ids = [2 + dice.randrange(len(WORDS)) for _ in range(length - 1)] + [EOS]
    for method, settings in methods.items():
        drafted, tokens = passes(dice, length, settings, ease)
        costs = sum(10 + visual / 200 + (nodes > 0) * 5 for nodes in drafted[1:])
        kept = round(visual * settings.get("keep_ratio", 1.0)) if "drafter" in settings else None
        yield answer(
            f"clip{sample:02}", method, video=f"video{clip}.mp4", ids=ids, drafted=drafted, tokens=tokens,
            visual_tokens=visual if "drafter" in settings else None, kept_visual_tokens=kept,
            ms=costs / (length - 1) * dice.uniform(0.95, 1.05), first_s=visual / 500,
        )  # fmt: skip


def overlay(directory, sample, method):
    """Write a picture and return its line."""
    file = directory / "overlays" / f"{sample}--{method}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (1600, 700), (16, 18, 24))
    pen = ImageDraw.Draw(picture)
    for place in range(8):
        pen.rectangle((20 + 195 * place, 60, 200 + 195 * place, 240), (60, 60, 80))
        pen.rectangle((40 + 195 * place, 80 + 10 * place, 90 + 195 * place, 180), (255, 196, 60))
    picture.save(file)
    summary = f"{method} keeps 58 of 576 visual tokens (10.1%) with 34% of the attention"
    return {"kind": "overlay", "sample": sample, "method": method, "file": str(file.relative_to(directory)),
            "summary": summary, "attention_kept": 0.34, "kept_visual_tokens": 58}  # fmt: skip


def run(directory, methods=METHODS, samples=40, seed=0, *, is_clean=False, stop=None, **changes):
    """Write a whole run: unless it is clean one answer differs, one failed, one sample is missing.

    Args:
        directory: where to.
        methods: settings by name.
        samples: how many; two share a video.
        seed: of the dice.
        is_clean: nothing goes wrong.
        stop: lines after which the run was killed.
        changes: of the origin.
    """
    dice = random.Random(seed)
    lines = [line for sample in range(samples) for line in lines_of(sample, methods, dice)]
    if changes.get("is_timed") is False:
        lines = [line | {"seconds": None, "ms_per_token": None, "peak_memory_bytes": None} for line in lines]
    if not is_clean:
        lines = [
            *spoilt(lines, list(methods)),
            {"kind": "problem", "where": "x.jsonl, line 3", "text": "no video <file>"},
        ]
    pictures = [overlay(directory, "clip00", name) for name in methods if "@" in name][:2]
    return put(directory, origin(methods, samples, **changes), *pictures, *lines[:stop])


def spoilt(lines, methods):
    """Return the lines with one answer that differs from plain decoding's and one that failed."""
    place = next(at for at, line in enumerate(lines) if (line["sample"], line["method"]) == ("clip01", methods[-1]))
    line, ids = lines[place], list(lines[place]["token_ids"])
    old, ids[12] = ids[12], 2 + (ids[12] - 1) % len(WORDS)
    text = answer("", "", ids=ids)["text"]
    differing = [line | {"token_ids": ids, "text": text}, difference("clip01", methods[-1], 12, old, ids[12], 0.003)]
    failed = {
        "kind": "failure",
        "sample": "clip02",
        "video": "video1.mp4",
        "method": methods[1],
        "text": "out of | memory",
    }
    kept = [one for one in lines if (one["sample"], one["method"]) != ("clip02", methods[1]) and one is not line]
    return [*kept[:place], *differing, failed, *kept[place:]]
