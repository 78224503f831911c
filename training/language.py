"""Words for scenes: captions, questions with answers, and the parser that reads the facts back out of a caption."""

import re
from dataclasses import dataclass

from numpy.random import Generator

from training.world import COLOURS, Scene, Thing

PROMPTS = (
    "Describe the video in detail.",
    "What happens?",
    "What happens in this video?",
    "Describe the video.",
    "Describe this video in detail.",
    "Please describe what you see in the video.",
    "Tell me what happens, in order.",
    "Describe the objects and their motion in the order in which they appear.",
)
ORDINALS = ("First", "Then", "Next", "After that", "Finally")
RANKS = ("first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation."""

    prompt: str
    answer: str


def joined(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def article(words: str) -> str:
    """The words after "a" or "an"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def heading(direction: str) -> str:
    """ "up", "to the lower left"."""
    return direction if direction in ("up", "down") else f"to the {direction}"


def entrance(thing: Thing) -> str:
    """How it comes into the picture."""
    kind, where = thing.path.entry.split(" ", 1)
    return f"enters from the {where}" if kind == "from" else f"appears at the {where}"


def ending(thing: Thing) -> str:
    """What becomes of it."""
    kind, _, where = thing.path.end.partition(" ")
    return {
        "leaves": f"leaves at the {where}",
        "stops": f"stops at the {where}",
        "bounces": f"bounces off the {where} edge and turns back",
        "moving": "is still moving at the end",
        "stays": "stays there",
        "vanishes": "vanishes later",
    }[kind]


def motion(thing: Thing) -> str:
    """How it moves; empty for an object at rest."""
    return f"moves {thing.path.speed} {heading(thing.path.direction)}" if thing.path.direction else ""


def described(thing: Thing) -> str:
    """ "large red circle marked 7"."""
    return f"{thing.size} {thing.name}" + ("" if thing.digit is None else f" marked {thing.digit}")


def story(thing: Thing) -> str:
    """What it does, from entry to ending."""
    moves = motion(thing)
    return entrance(thing) + (f", {moves}" if moves else "") + f" and {ending(thing)}"


def closing(scene: Scene) -> str:
    """What is left in view."""
    left = [f"the {thing.name}" for thing in scene.things if thing.remains]
    if not left:
        return "At the end nothing is in view."
    return f"At the end {joined(left)} {'is' if len(left) == 1 else 'are'} in view."


def caption(scene: Scene) -> str:
    """The reference caption: the background, each object in order of appearance, and what is left."""
    opening = f"On a {scene.brightness} {scene.texture} background there are {len(scene.things)} objects."
    sentences = [f"{ORDINALS[k]} {article(described(thing))} {story(thing)}." for k, thing in enumerate(scene.things)]
    return " ".join([opening, *sentences, closing(scene)])


# ---------------------------------------------------------------------------------------------------------- parsing

_OPENING = re.compile(r"On a (\w+ \w+) background there are (\d)")
_OBJECT = re.compile(
    rf"(?:{'|'.join(ORDINALS)}) an? (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+)(?: marked (?P<digit>\d))? "
    r"(?:enters (?P<from>from) the (?P<side>\w+)|appears (?P<at>at) the (?P<place>\w+(?: \w+)?))"
    r"(?:, moves (?P<speed>\w+) (?:to the )?(?P<direction>\w+(?: (?:left|right))?))?"
    r" and (?P<end>[\w ]+)\."
)
_ENDINGS = (
    (re.compile(r"leaves at the (\w+)"), "leaves {}"),
    (re.compile(r"stops at the ([\w ]+)"), "stops {}"),
    (re.compile(r"bounces off the (\w+) edge and turns back"), "bounces {}"),
    (re.compile(r"is still moving at the end"), "moving"),
    (re.compile(r"stays there"), "stays"),
    (re.compile(r"vanishes later"), "vanishes"),
)


def _parse_end(words: str) -> str | None:
    for pattern, form in _ENDINGS:
        if match := pattern.fullmatch(words):
            return form.format(*match.groups())
    return None


def _parse_object(match: re.Match[str]) -> dict[str, str | None]:
    facts = {slot: match[slot] for slot in ("size", "colour", "shape")}
    if match["size"] == "large":
        facts["digit"] = match["digit"] or "none"
    facts["entry"] = f"from {match['side']}" if match["from"] else f"at {match['place']}"
    if match["direction"]:
        facts |= {"direction": match["direction"], "speed": match["speed"]}
    return facts | {"end": _parse_end(match["end"])}


def parse(text: str) -> dict[str, str | None]:
    """The facts that a caption states, keyed like `Scene.facts`; what cannot be read is absent."""
    facts: dict[str, str | None] = {}
    if match := _OPENING.search(text):
        facts["background"], facts["count"] = match.groups()
    for k, match in enumerate(_OBJECT.finditer(text)):
        facts |= {f"{k}.{slot}": value for slot, value in _parse_object(match).items()}
    if match := re.search(r"At the end (.*) (?:is|are) in view", text):
        colours = [word for word in re.findall(r"\w+", match[1]) if word in COLOURS]
        facts["remaining"] = " ".join(colours) or "none"
    return facts


def score(text: str, reference: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Facts right and facts asked for, by slot; the k-th sentence is compared with the k-th object and nothing else."""
    stated, tally = parse(text), {}
    for key, value in reference.items():
        slot = key.split(".")[-1]
        right, asked = tally.get(slot, (0, 0))
        tally[slot] = (right + (stated.get(key) == value), asked + 1)
    return tally


# -------------------------------------------------------------------------------------------------------- questions


def _about(scene: Scene, thing: Thing, rng: Generator) -> str:
    """A phrase that picks out one object: colours differ in a scene, shapes may not."""
    shapes = [other.shape for other in scene.things]
    options = [f"the {thing.name}", f"the {thing.colour} object"]
    if shapes.count(thing.shape) == 1:
        options.append(f"the {thing.shape}")
    return options[rng.integers(len(options))]


def _thing_turns(thing: Thing, it: str) -> list[Turn]:
    """Every question about one object, named `it`."""
    turns = [
        Turn(f"What size is {it}?", f"It is {thing.size}."),
        Turn(f"Which digit is on {it}?", "It has no digit." if thing.digit is None else f"It is marked {thing.digit}."),
        Turn(f"Where does {it} come from?", f"It {entrance(thing)}."),
        Turn(f"What does {it} do?", f"It {story(thing)}."),
        Turn(f"What happens to {it} at the end?", f"It {ending(thing)}."),
    ]
    if thing.path.direction:
        turns += [
            Turn(f"Where does {it} go?", f"It {motion(thing)}."),
            Turn(f"How fast is {it}?", f"It moves {thing.path.speed}."),
        ]
    return turns


def _identity_turn(scene: Scene, thing: Thing, rng: Generator) -> Turn:
    """A question whose answer is what the object is."""
    k = scene.things.index(thing)
    turns = [
        Turn(f"What shape is the {thing.colour} object?", f"It is {article(thing.shape)}."),
        Turn(f"Which object comes {RANKS[k]}?", f"{article(described(thing)).capitalize()} comes {RANKS[k]}."),
        Turn(f"Is there {article(thing.colour)} object?", f"Yes, {article(described(thing))}."),
    ]
    if thing is scene.things[-1]:
        turns.append(Turn("Which object comes last?", f"{article(described(thing)).capitalize()} comes last."))
    if sum(other.shape == thing.shape for other in scene.things) == 1:
        turns.append(Turn(f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}."))
    if thing.digit is not None and sum(other.digit == thing.digit for other in scene.things) == 1:
        turns.append(Turn(f"Which object is marked {thing.digit}?", f"The {thing.name} is marked {thing.digit}."))
    return turns[rng.integers(len(turns))]


def _scene_turn(scene: Scene, rng: Generator) -> Turn:
    """A question about the whole clip."""
    i, j = rng.permutation(len(scene.things))[:2]
    before, after = scene.things[i], scene.things[j]
    verdict = "Yes, it comes before" if i < j else "No, it comes after"
    absent = [colour for colour in COLOURS if colour not in {thing.colour for thing in scene.things}]
    missing = absent[rng.integers(len(absent))]
    turns = [
        Turn("How many objects are there?", f"There are {len(scene.things)} objects."),
        Turn("What is the background like?", f"It is {scene.brightness} and {scene.texture}."),
        Turn("Which objects are in view at the end?", closing(scene)),
        Turn(f"Does the {before.name} come before the {after.name}?", f"{verdict} the {after.name}."),
        Turn(f"Is there {article(missing)} object?", f"No, there is no {missing} object."),
        Turn("List the objects.", f"{joined([article(described(thing)) for thing in scene.things]).capitalize()}."),
    ]
    return turns[rng.integers(len(turns))]


def questions(scene: Scene, rng: Generator, count: int) -> list[Turn]:
    """`count` short turns; some follow up on the object of the turn before and call it "it"."""
    turns: list[Turn] = []
    while len(turns) < count:
        if rng.random() < 0.25:
            drawn = [_scene_turn(scene, rng)]
        else:
            thing = scene.things[rng.integers(len(scene.things))]
            drawn = [_identity_turn(scene, thing, rng)] if rng.random() < 0.4 else []
            options = _thing_turns(thing, "it" if drawn else _about(scene, thing, rng))
            drawn.append(options[rng.integers(len(options))])
        if drawn[0] not in turns:  # a repeated question would be answered from the text
            turns += drawn
    return turns[:count]


def conversation(scene: Scene, rng: Generator, num_questions: int, captioned: float) -> list[Turn]:
    """A training conversation: a caption, at times followed up, or a run of questions."""
    if rng.random() >= captioned:
        return questions(scene, rng, num_questions)
    follow_ups = questions(scene, rng, int(rng.integers(1, 3))) if rng.random() < 0.2 else []
    return [Turn(PROMPTS[rng.integers(len(PROMPTS))], caption(scene)), *follow_ups]
