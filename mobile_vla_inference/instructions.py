"""Instructions: one form for texts that look the same, and the texts that are refused. Pure Python."""

from __future__ import annotations

import re
import unicodedata

from mobile_vla_inference.errors import InstructionError

#: Longer instructions are refused before they reach the tokenizer (bytes of UTF-8).
MAX_INSTRUCTION_BYTES = 4096

#: Invisible characters that Unicode does not classify as format characters (Cf): the rest of its property
#: Default_Ignorable_Code_Point, of which Python has no table. Joiners, Hangul fillers, variation selectors.
_IGNORABLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
#: Show text in another order than it is stored and read.
_OVERRIDES = "\u202d\u202e"
#: Categories that are not characters: unassigned (this depends on Python's version), private use, half of a pair.
_NO_CHARACTERS = {"Cn": "is not assigned", "Co": "is reserved for private use", "Cs": "is half of a pair (not UTF-8)"}


def check_instruction(text: str) -> str:
    """Return the instruction in the one form that texts which look the same share; empty is valid: stand still.

    The form is Unicode's NFKC without invisible characters (byte order mark, joiners, soft hyphen, directional marks,
    variation selectors); white space and control characters become single spaces. Decomposed Korean, which macOS
    sends, would give other tokens. NFKC and not NFC, because Kosmos-2's tokenizer normalises by NFKC and CLIP's by
    NFC: so both read the same text, and full-width or half-width input becomes plain text.

    Raises:
        InstructionError: the text is too long, is not UTF-8, contains a code point that is not a character, or one that
            changes the order in which the text is shown.
    """
    _check_length(text)
    if "\ufffd" in text:
        raise InstructionError(
            "instruction contains bytes that are not UTF-8, expected UTF-8 text; check the publisher"
        )
    if not text.isascii():
        for character in text:
            reason = _NO_CHARACTERS.get(unicodedata.category(character))
            if character in _OVERRIDES:
                reason = "changes the order in which the text is shown"
            if reason is not None:
                raise InstructionError(
                    f"instruction contains U+{ord(character):04X}, which {reason}, expected plain text; type it again"
                )
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in _IGNORABLE.sub("", text) if unicodedata.category(c) != "Cf")
        _check_length(text)
    printable = "".join(c if c.isprintable() else " " for c in text)
    # Characters that an invisible one separated can compose now.
    return unicodedata.normalize("NFKC", " ".join(printable.split()))


def _check_length(text: str) -> None:
    size = len(text.encode("utf-8", errors="replace"))
    if size > MAX_INSTRUCTION_BYTES:
        raise InstructionError(
            f"instruction is {size} bytes long, expected at most {MAX_INSTRUCTION_BYTES}; send a sentence"
        )
