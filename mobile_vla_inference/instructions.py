"""Instructions: one form for texts that look the same, and which texts are refused. Pure Python."""

from __future__ import annotations

import re
import unicodedata

from mobile_vla_inference.errors import InstructionError

#: Longer instructions are refused before they reach the tokenizer (bytes of UTF-8).
MAX_INSTRUCTION_BYTES = 4096

#: Characters without a picture of their own that Unicode does not call format characters (Cf): the rest of its
#: property Default_Ignorable_Code_Point, of which Python has no table. Joiners, Hangul fillers, variation selectors.
_IGNORABLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
#: Show text in another order than it is stored and read.
_OVERRIDES = "\u202d\u202e"
#: What stands for no character: unassigned (and changing with Python's version), private use, half of a pair.
_NO_CHARACTERS = {"Cn": "is not assigned", "Co": "is for private use", "Cs": "is half of a pair (not UTF-8)"}


def check_instruction(text: str) -> str:
    """Return the instruction in the one form that texts which look the same share; empty is valid: stand still.

    The form is Unicode's NFKC without invisible characters (byte order mark, joiners, soft hyphen, directional marks,
    variation selectors), white space and control characters folded into single spaces. Decomposed Korean, which macOS
    sends, would be other tokens. NFKC and not NFC, because Kosmos-2's own tokenizer folds by it and CLIP's by NFC:
    so both read the same, and full-width or half-width input is the plain text.

    Raises:
        InstructionError: the text is too long, no UTF-8, or holds what is no character or reverses the order shown.
    """
    _check_length(text)
    if "\ufffd" in text:
        raise InstructionError("instruction holds bytes that are not UTF-8, expected UTF-8 text; check the publisher")
    if not text.isascii():
        for character in text:
            reason = _NO_CHARACTERS.get(unicodedata.category(character))
            if character in _OVERRIDES:
                reason = "shows the text in another order than it is read"
            if reason is not None:
                raise InstructionError(
                    f"instruction holds U+{ord(character):04X}, which {reason}, expected plain text; type it anew"
                )
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in _IGNORABLE.sub("", text) if unicodedata.category(c) != "Cf")
        _check_length(text)
    printable = "".join(c if c.isprintable() else " " for c in text)
    # What stood apart by an invisible character may compose now.
    return unicodedata.normalize("NFKC", " ".join(printable.split()))


def _check_length(text: str) -> None:
    size = len(text.encode("utf-8", errors="replace"))
    if size > MAX_INSTRUCTION_BYTES:
        raise InstructionError(
            f"instruction is {size} bytes long, expected at most {MAX_INSTRUCTION_BYTES}; send a sentence"
        )
