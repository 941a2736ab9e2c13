"""The embedded default's world: short stories from a grammar of our own, and a rule as gold reward.

A story opens with who and where (the prompt) and goes on with events, each of them happy, plain or
sad. The grammar draws the three moods unevenly, so that pi0 seldom tells a wholly happy story and
there is room between pi0 and the optimum.
"""

import random

from experiments.gold import WordReward

_NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June")
_KINDS = ("fox", "bear", "girl", "boy", "cat", "robot", "owl", "mouse", "king", "baker")
_PLACES = ("forest", "village", "garden", "castle", "harbour", "city", "valley", "school")
_TRAITS = ("small", "tall", "young", "old", "quiet", "busy", "clever", "sleepy")
_THINGS = ("ball", "cake", "kite", "book", "boat", "lamp", "song", "drum", "coat", "map")

_EVENTS = {
    "happy": (
        "{name} found a lovely {thing} and laughed.",
        "A friend gave {name} a bright {thing}.",
        "{name} danced with joy in the {place}.",
        "The {thing} made everyone happy.",
        "{name} shared the {thing} with a kind friend.",
    ),
    "plain": (
        "{name} walked to the {place}.",
        "The {thing} was on the table.",
        "{name} looked at the {thing}.",
        "It was time for lunch in the {place}.",
        "{name} put the {thing} in a box.",
    ),
    "sad": (
        "{name} lost the {thing} and cried.",
        "The {thing} was broken and dirty.",
        "{name} felt lonely in the dark {place}.",
        "A cruel {kind} took the {thing}.",
        "{name} was afraid and sad.",
    ),
}
_MOODS = {"happy": 0.25, "plain": 0.4, "sad": 0.35}

_HAPPY = ("lovely", "laughed", "friend", "bright", "danced", "joy", "happy", "shared", "kind")
_SAD = ("lost", "cried", "broken", "dirty", "lonely", "dark", "cruel", "afraid", "sad")


def gold_reward() -> WordReward:
    """The rule: one nat for a happy word, minus one for a sad word, over sqrt(words)."""
    return WordReward({**dict.fromkeys(_HAPPY, 1.0), **dict.fromkeys(_SAD, -1.0)})


def stories(count: int, *, seed: int) -> list[tuple[str, str]]:
    """``count`` pairs (prompt, continuation); the prompt is the opening sentence."""
    draw = random.Random(seed)
    return [_story(draw) for _ in range(count)]


def _story(draw: random.Random) -> tuple[str, str]:
    name, kind, place = draw.choice(_NAMES), draw.choice(_KINDS), draw.choice(_PLACES)
    prompt = f"{name} was a {draw.choice(_TRAITS)} {kind} in a {draw.choice(_TRAITS)} {place}."
    events = [
        draw.choice(_EVENTS[mood]).format(
            name=name, kind=draw.choice(_KINDS), place=place, thing=draw.choice(_THINGS)
        )
        for mood in draw.choices(list(_MOODS), list(_MOODS.values()), k=draw.randint(2, 4))
    ]
    return prompt, " " + " ".join(events)
