"""Write the processor folder of a synthetic checkpoint (storage/checkpoint_files.py finds processor folders).

It holds a tokenizer folder for each of the two models in Hugging Face's layout, as the downloaded ones of
microsoft/kosmos-2-patch14-224 and openai/clip-vit-base-patch32 have it. The synthetic tokenizers are byte-level BPEs of
the same form, trained on a few driving instructions: they can encode every text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from mobile_vla_inference.atomic import write_text_atomically
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.checkpoint_files import (
    CLIP_FOLDER,
    KOSMOS_FOLDER,
    KOSMOS_TAGS,
)
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.settings import IMAGE_NORMALIZATIONS

_KOSMOS_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3
_PATCH_INDEX_TOKENS = 1024
_CLIP_START = "<|startoftext|>"
_CLIP_END = "<|endoftext|>"
#: How CLIP's tokenizer divides text into words.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

_PLACES_KO = (
    "컵",
    "박스",
    "문",
    "의자",
    "책상",
    "사람",
    "벽",
    "상자",
    "로봇",
    "출구",
    "복도",
    "노란 선",
    "빨간 공",
    "파란 기둥",
)
_PLACES_EN = ("cup", "box", "door", "chair", "desk", "person", "wall", "robot", "exit", "corridor", "line", "cone")
_SENTENCES_KO = (
    "{a}를 왼쪽으로 돌아서 {b}까지 가세요",
    "{a}을 오른쪽으로 돌아서 {b}까지 가세요",
    "{a}를 피해서 {b} 앞으로 이동하세요",
    "{a} 옆을 지나 {b} 쪽으로 천천히 가 주세요",
    "{a}와 {b} 사이를 똑바로 지나가세요",
    "{a} 앞에서 멈추세요",
    "{a} 뒤에 있는 {b}를 따라가세요",
    "앞에 보이는 {a}까지 직진한 다음 {b}에서 정지해 주십시오",
)
_SENTENCES_EN = (
    "go around the {a} to the left and drive to the {b}",
    "go around the {a} to the right and drive to the {b}",
    "avoid the {a} and move in front of the {b}",
    "drive slowly past the {a} towards the {b}",
    "drive straight between the {a} and the {b}",
    "stop in front of the {a}",
    "follow the {b} behind the {a}",
    "keep going forward until you see the {a}, then turn back to the {b}",
)


def write_processors(folder: Path | str, config: HybridConfig, sentences: Sequence[str] | None = None) -> None:
    """Write the processors of a synthetic or small policy, for its vocabulary sizes. The files are always the same.

    Args:
        folder: to write.
        config: sizes of the architecture.
        sentences: training text of the tokenizers; similar text takes few tokens; None: instructions.

    Raises:
        CheckpointError: a vocabulary is too small for all bytes and the special tokens.
    """
    folder = Path(folder)
    sentences = _sentences() if sentences is None else sentences
    _write_kosmos(folder / KOSMOS_FOLDER, config, sentences)
    if config.clip_text is not None:
        _write_clip(folder / CLIP_FOLDER, config, sentences)


def _sentences() -> list[str]:
    """Return the driving instructions that the tokenizers are trained on."""
    korean = [s.format(a=a, b=b) for s in _SENTENCES_KO for a in _PLACES_KO for b in _PLACES_KO if a != b]
    english = [s.format(a=a, b=b) for s in _SENTENCES_EN for a in _PLACES_EN for b in _PLACES_EN if a != b]
    return korean + english


def _byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _merges(
    tokenizer: Tokenizer, symbols: list[str], suffix: str, count: int, sentences: Sequence[str]
) -> list[tuple[str, str]]:
    """Train a byte-level BPE over `symbols` with the tokenizer's normalisation and splitting; return its merges.

    The symbols are special tokens, because only then their ids, which decide ties, are the same every time.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + count,
        special_tokens=symbols,
        initial_alphabet=_byte_alphabet(),
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges]


def _vocabulary(first: tuple[str, ...], symbols: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    tokens = dict.fromkeys([*first, *symbols])
    tokens.update(dict.fromkeys(left + right for left, right in merges))
    return {token: index for index, token in enumerate(tokens)}


def _merge_count(vocab_size: int, symbols: int, specials: int, model: str) -> int:
    count = vocab_size - symbols - specials
    if count < 0:
        raise CheckpointError(
            f"a {model} vocabulary of {vocab_size} can't hold all bytes and special tokens, "
            f"expected at least {symbols + specials}; choose a larger one"
        )
    return count


def _kosmos_skeleton(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write_kosmos(folder: Path, config: HybridConfig, sentences: Sequence[str]) -> None:
    vocab_size = config.kosmos_text.vocab_size
    alphabet = _byte_alphabet()
    patches = [f"<patch_index_{index:04d}>" for index in range(_PATCH_INDEX_TOKENS)]
    if vocab_size < 2 * len(patches) + len(alphabet):
        patches = []
    tags = [*KOSMOS_TAGS, *patches]
    count = _merge_count(vocab_size, len(alphabet), len(_KOSMOS_SPECIALS) + len(tags), "Kosmos-2")
    merges = _merges(_kosmos_skeleton(BPE()), alphabet, "", count, sentences)
    vocabulary = _vocabulary(_KOSMOS_SPECIALS, alphabet, merges)
    tokenizer = _kosmos_skeleton(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _KOSMOS_SPECIALS])
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, rstrip=False, normalized=False) for tag in tags])
    bos, eos = ("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[bos, eos]
    )
    specials = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    _write_folder(folder, tokenizer, specials, "PreTrainedTokenizerFast", config.kosmos_vision.image_size)


def _clip_skeleton(model: BPE) -> Tokenizer:
    """Return a tokenizer that normalises and splits as CLIP's does."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write_clip(folder: Path, config: HybridConfig, sentences: Sequence[str]) -> None:
    vocab_size = config.clip_text.vocab_size
    suffix = "</w>"
    alphabet = _byte_alphabet()
    symbols = [*alphabet, *(byte + suffix for byte in alphabet)]
    count = _merge_count(vocab_size, len(symbols), 2, "CLIP")
    merges = _merges(_clip_skeleton(BPE(end_of_word_suffix=suffix)), symbols, suffix, count, sentences)
    vocabulary = _vocabulary((), symbols, merges)
    for token in (_CLIP_START, _CLIP_END):
        vocabulary[token] = len(vocabulary)
    model = BPE(vocab=vocabulary, merges=merges, unk_token=_CLIP_END, end_of_word_suffix=suffix, fuse_unk=False)
    tokenizer = _clip_skeleton(model)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (_CLIP_START, _CLIP_END)])
    start, end = ((token, vocabulary[token]) for token in (_CLIP_START, _CLIP_END))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    specials = {"bos_token": _CLIP_START, "eos_token": _CLIP_END, "unk_token": _CLIP_END, "pad_token": _CLIP_END}
    _write_folder(folder, tokenizer, specials, "CLIPTokenizer", config.image_size, config.clip_text.max_positions)
    _write_json(folder / "vocab.json", vocabulary)
    text = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    write_text_atomically(folder / "merges.txt", text)


def _write_folder(
    folder: Path,
    tokenizer: Tokenizer,
    specials: dict[str, str],
    tokenizer_class: str,
    image_size: int,
    max_tokens: int | None = None,
) -> None:
    """Write one processor in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    image_mean, image_std = IMAGE_NORMALIZATIONS["clip"]
    tokenizer_config: dict[str, Any] = {"tokenizer_class": tokenizer_class, **specials}
    if max_tokens is not None:
        tokenizer_config["model_max_length"] = max_tokens
    write_text_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": image_size},
            "do_center_crop": True,
            "crop_size": {"height": image_size, "width": image_size},
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": list(image_mean),
            "image_std": list(image_std),
            "do_convert_rgb": True,
        },
    )


def _write_json(path: Path, data: Any) -> None:
    write_text_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
