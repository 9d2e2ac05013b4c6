"""Instructions for the scenarios, in English and Korean; the words are drawn from a seed."""

from __future__ import annotations

from itertools import chain

import numpy as np

from mobile_vla_inference.sim.scenarios import cone_side, is_by_cone, side_of

# Phrases of training, by language; {box}, {cup} and {side}, the side to pass on, are replaced.
_BOX_WORDS = {"en": ("box", "crate", "block", "obstacle"), "ko": ("박스", "상자", "장애물")}
_CUP_WORDS = {"en": ("cup", "mug"), "ko": ("컵", "머그컵")}
_SIDE_WORDS = {"en": {"left": "left", "right": "right"}, "ko": {"left": "왼쪽", "right": "오른쪽"}}
_PHRASES = {
    "en": (
        "Go around the {box} on the {side} to the {cup}",
        "Go around the {box} to the {side} and drive to the {cup}",
        "Pass the {box} on the {side} and go to the {cup}",
        "Drive to the {cup}, passing the {box} on the {side}",
        "Take the {side} side of the {box} to reach the {cup}",
        "Keep {side} of the {box} and stop at the {cup}",
        "Reach the {cup} by going {side} around the {box}",
        "Avoid the {box} on its {side} side, then go to the {cup}",
        "Move to the {cup} around the {side} of the {box}",
        "{side} around the {box}, then to the {cup}",
        "Please go past the {box} on the {side} and on to the {cup}",
        "On the {side} of the {box}, drive to the {cup}",
        "Head for the {cup} and leave the {box} by its {side} side",
        "Turn {side} at the {box} and go to the {cup}",
        "Get to the {cup}; use the {side} side",
        "{side} side, please: go to the {cup}",
        "Steer {side} of the {box} and find the {cup}",
        "Go {side}",
    ),
    "ko": (
        "{box}를 {side}으로 돌아서 {cup}까지 가세요",
        "{box}를 {side}으로 돌아 {cup}으로 가 주세요",
        "{side}으로 {box}를 피해서 {cup}까지 이동하세요",
        "{box}의 {side}으로 지나서 {cup} 앞까지 가세요",
        "{cup}까지 가세요, {box}는 {side}으로 피하세요",
        "{box} {side}으로 돌아서 {cup}에 가",
        "{side}으로 돌아가서 {cup} 앞에 멈추세요",
        "{box}를 {side}으로 비켜서 {cup}까지 주행해",
        "{box} {side} 길로 {cup}까지 가 주십시오",
        "{cup}으로 이동, {box}는 {side}으로 통과",
        "{box}를 피해 {side}으로 가서 {cup}을 찾으세요",
        "{side}으로 우회해서 {cup}까지 가세요",
        "{box} 앞에서 {side}으로 꺾어 {cup}까지 가세요",
        "{cup}이 보일 때까지 {box} {side}으로 도세요",
        "{side}으로 가세요",
        "로봇아, {box}를 {side}으로 돌아서 {cup}까지 가",
        "{side} 방향으로 {box}를 돌아 {cup}에 도착하세요",
    ),
}
# Phrases for a cone that shows the side: {where} is on the cone's side (True), or on the other (False).
_WHERE_WORDS = {
    "en": {
        True: ("on the side of the cone", "on the cone's side", "on the same side as the cone", "where the cone was"),
        False: (
            "on the side without the cone",
            "on the side opposite the cone",
            "on the other side than the cone",
            "where no cone was",
        ),
    },
    "ko": {
        True: ("콘이 있는 쪽으로", "콘 쪽으로", "콘이 있던 쪽으로", "콘과 같은 쪽으로"),
        False: ("콘이 없는 쪽으로", "콘 반대쪽으로", "콘이 없던 쪽으로", "콘과 다른 쪽으로"),
    },
}
_CONE_PHRASES = {
    "en": (
        "Go around the {box} {where} to the {cup}",
        "Pass the {box} {where} and go to the {cup}",
        "Drive to the {cup}, passing the {box} {where}",
        "Go through the door, then round the {box} {where}",
        "Avoid the {box} {where}, then go to the {cup}",
        "Behind the door, drive {where} to the {cup}",
        "Go {where}",
    ),
    "ko": (
        "{box}를 {where} 돌아서 {cup}까지 가세요",
        "{where} {box}를 피해서 {cup}까지 이동하세요",
        "{cup}까지 가세요, {box}는 {where} 피하세요",
        "문을 지나 {where} {box}를 돌아서 가세요",
        "{box}를 {where} 지나서 {cup} 앞까지 가세요",
        "문을 지나서 {where} {cup}까지 가",
        "{where} 가세요",
    ),
}
#: Phrases that are never used in training: those of `mobile_vla drive --unseen-phrasing`.
UNSEEN_PHRASES = (
    "Navigate to the {cup} while keeping to the {side} side of the {box}",
    "Circle the {box} on the {side} until you are at the {cup}",
    "The {cup} is behind the {box}: approach it from the {side}",
    "Slowly drive {side} past the {box} and park at the {cup}",
    "I want you to go {side} round the {box}, over to the {cup}",
    "{box}를 {side}으로 우회하여 {cup} 쪽으로 이동해 주세요",
    "{side}으로 {box}를 지나쳐 {cup} 앞에 서세요",
    "천천히 {box} {side}을 지나 {cup}까지 가 주세요",
    "{box} 뒤에 있는 {cup}까지 {side}으로 돌아서 가 줘",
    "저기 {cup}까지 {side} 방향으로 돌아가 주세요",
)
UNSEEN_CONE_PHRASES = (
    "Navigate to the {cup} and pass the {box} {where}",
    "Circle the {box} {where} until you are at the {cup}",
    "I want you to drive {where} round the {box}, over to the {cup}",
    "{box}를 {where} 우회하여 {cup} 쪽으로 이동해 주세요",
    "{where} {box}를 지나쳐 {cup} 앞에 서세요",
    "{box} 뒤에 있는 {cup}까지 {where} 돌아서 가 줘",
)
#: The sentence of the original data, for the demo and for figures without a phrasing.
CANONICAL_PHRASES = {
    "en": "Go around the {box} on the {side} to the {cup}",
    "ko": "{box}를 {side}으로 돌아서 {cup}까지 가세요",
}
_CANONICAL_CONE_PHRASES = {
    "en": "Go around the {box} {where} to the {cup}",
    "ko": "{box}를 {where} 돌아서 {cup}까지 가세요",
}


def instruction(scenario: str, seed: int, phrasing: str = "training", language: str | None = None) -> str:
    """Return the instruction of a scenario.

    Args:
        scenario: one of SCENARIOS.
        seed: draws the language and the words.
        phrasing: `training`, `unseen` (never trained on), or `canonical` (the sentence of the original data).
        language: `en` or `ko`; None: drawn.
    """
    rng = np.random.default_rng([seed, 1])
    by_cone = is_by_cone(scenario)
    if phrasing == "unseen":
        phrase = str(rng.choice(UNSEEN_CONE_PHRASES if by_cone else UNSEEN_PHRASES))
        language = "en" if phrase.isascii() else "ko"
    else:
        language = language or str(rng.choice(["en", "ko"]))
        phrases = (_CONE_PHRASES if by_cone else _PHRASES)[language]
        canonical = (_CANONICAL_CONE_PHRASES if by_cone else CANONICAL_PHRASES)[language]
        phrase = canonical if phrasing == "canonical" else str(rng.choice(phrases))
    plain = phrasing == "canonical"
    box = _BOX_WORDS[language][0] if plain else str(rng.choice(_BOX_WORDS[language]))
    cup = _CUP_WORDS[language][0] if plain else str(rng.choice(_CUP_WORDS[language]))
    if language == "en" and scenario.startswith("2box"):
        box = {"box": "boxes"}.get(box, f"{box}s")
    side = side_of(scenario)
    wheres = _WHERE_WORDS[language][cone_side(seed) == side]
    where = wheres[0] if plain else str(rng.choice(wheres))
    text = phrase.format(box=box, cup=cup, side=_SIDE_WORDS[language][side], where=where)
    if language == "ko":
        return _with_particles(text)
    text = text[0].upper() + text[1:]
    if phrasing == "training":  # people write in different ways
        text = [text, text.lower(), text + ".", text + "!"][rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])]
    return text


def training_sentences() -> list[str]:
    """Return every sentence of the training phrases, for the tokenizers."""
    return [
        _with_particles(phrase.format(box=box, cup=cup, side=side, where=where))
        for language in _PHRASES
        for box in _BOX_WORDS[language]
        for cup in _CUP_WORDS[language]
        for phrases, sides, wheres in (
            (_PHRASES, _SIDE_WORDS[language].values(), [""]),
            (_CONE_PHRASES, [""], chain.from_iterable(_WHERE_WORDS[language].values())),
        )
        for where in wheres
        for side in sides
        for phrase in phrases[language]
    ]


def with_unknown_word(text: str, rng: np.random.Generator) -> str:
    """Insert a made-up word into a sentence, so that training teaches to ignore unknown words."""
    if text.isascii():
        word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 9)))
    else:
        word = "".join(chr(code) for code in rng.integers(0xAC00, 0xD7A4, rng.integers(1, 4)))  # syllables of Hangul
    words = text.split(" ")
    words.insert(int(rng.integers(0, len(words) + 1)), word)
    return " ".join(words)


def _with_particles(text: str) -> str:
    """Correct the Korean particles after a consonant: 장애물를 becomes 장애물을."""
    for wrong, right in (("장애물를", "장애물을"), ("장애물는", "장애물은")):
        text = text.replace(wrong, right)
    return text
