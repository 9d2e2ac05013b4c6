"""From frames and instructions to tensors: against numpy, transformers' Kosmos-2 processor, and arbitrary text."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.models.kosmos2.processing_kosmos2 import Kosmos2Processor

from mobile_vla_inference.errors import CheckpointError, InstructionError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.policy.preprocess import FrameNormalizer, InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint import open_checkpoint
from mobile_vla_inference.policy.storage.checkpoint_files import KOSMOS_TAGS, find_processors, processor_folders
from mobile_vla_inference.policy.storage.config import standard_config
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.policy.storage.settings_file import load_settings
from mobile_vla_inference.policy.synthetic.processors import CLIP_FOLDER, KOSMOS_FOLDER, write_processors
from mobile_vla_inference.tools.arguments import SMALL_POLICY

CONFIG = standard_config("tiny", "hybrid")
KOREAN = (
    "박스를 왼쪽으로 돌아서 컵까지 가세요",
    "두 개의 상자 사이를 지나 오른쪽 의자 앞에서 멈춰 주세요",
    "벽을 따라 천천히 직진하다가 문이 보이면 정지하세요",
)
ENGLISH = ("go to the cup", "go to the box", "turn left, then stop")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_processors(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> InstructionEncoder:
    return make_encoder(folder)


@pytest.fixture(scope="module")
def kosmos_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / KOSMOS_FOLDER, local_files_only=True)


def make_encoder(folder: Path, config=CONFIG, policy_settings: PolicySettings | None = None) -> InstructionEncoder:
    return InstructionEncoder(processor_folders(folder, config), config, policy_settings or PolicySettings())


class MinimalImageProcessor:
    """Stand-in for the image processor of a Kosmos2Processor; only tokens are compared."""

    def __call__(self, images, **kwargs) -> BatchFeature:
        return BatchFeature({"pixel_values": [np.zeros((3, 1, 1))]})


class StockProcessor(Kosmos2Processor):
    """Kosmos2Processor without the check that the image processor is a registered class."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


@pytest.mark.parametrize("template", ["{instruction}", "<grounding> {instruction}"])
@pytest.mark.parametrize("instruction", [*KOREAN, *ENGLISH, "  <phrase> a cup</phrase> 🚗 "])
def test_prompt_equals_the_stock_kosmos_processor_token_by_token(folder: Path, instruction: str, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / KOSMOS_FOLDER, local_files_only=True)
    stock = StockProcessor(MinimalImageProcessor(), tokenizer, num_patch_index_tokens=0)  # adds tokens to it
    expected = stock(
        images=np.zeros((56, 56, 3), np.uint8),
        text=template.replace("{instruction}", instruction),
        num_image_tokens=CONFIG.latent_query_num,
        return_tensors="pt",
    )
    prompt = make_encoder(folder, policy_settings=PolicySettings(prompt=template)).prompt(instruction)
    for name in ("input_ids", "attention_mask", "image_embeds_position_mask"):
        assert torch.equal(getattr(prompt, name), expected[name]), name


def test_prompt_layout(encoder: InstructionEncoder, kosmos_tokenizer: PreTrainedTokenizerBase) -> None:
    latents = CONFIG.latent_query_num
    prompt = encoder.prompt("go to the cup")
    ids = prompt.input_ids[0].tolist()
    assert ids[0] == 0
    assert ids[2 : 2 + latents] == list(range(4, 4 + latents))
    assert kosmos_tokenizer.convert_ids_to_tokens([ids[1], ids[2 + latents]]) == ["<image>", "</image>"]
    assert prompt.image_embeds_position_mask[0].nonzero().flatten().tolist() == list(range(2, 2 + latents))


def test_clip_ids_are_start_text_end(encoder: InstructionEncoder, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / CLIP_FOLDER, local_files_only=True)
    ids = encoder.clip_ids("go to the cup")[0].tolist()
    assert ids[-1] == encoder.clip_eos_token_id
    assert ids.index(encoder.clip_eos_token_id) == len(ids) - 1
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|startoftext|>"


@pytest.mark.parametrize("instruction", [*KOREAN, *ENGLISH])
def test_normal_instructions_fit_clip_without_a_warning(
    encoder: InstructionEncoder, instruction: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert encoder.clip_ids(instruction).shape[1] <= 77
    assert not caplog.records


def test_different_instructions_encode_differently(encoder: InstructionEncoder) -> None:
    texts = [*KOREAN, *ENGLISH]
    assert len({tuple(encoder.prompt(text).input_ids[0].tolist()) for text in texts}) == len(texts)
    assert len({tuple(encoder.clip_ids(text)[0].tolist()) for text in texts}) == len(texts)


def test_a_long_instruction_is_cut_for_clip_with_a_warning(
    encoder: InstructionEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ids = encoder.clip_ids("컵 박스 " * 60)
    assert ids.shape == (1, 77)
    assert ids[0, -1] == encoder.clip_eos_token_id
    assert "77" in caplog.text


def test_an_instruction_beyond_kosmos_is_refused(encoder: InstructionEncoder) -> None:
    with pytest.raises(InstructionError, match="2048"):
        encoder.prompt("🚗" * 1000)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=("Cs",))).filter(lambda text: "<" not in text))
def test_any_text_survives_the_kosmos_tokenizer(kosmos_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = kosmos_tokenizer(text, add_special_tokens=False).input_ids
    assert kosmos_tokenizer.unk_token_id not in ids
    assert kosmos_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_is_encoded_by_both_tokenizers(encoder: InstructionEncoder, text: str) -> None:
    prompt, clip_ids = encoder.prompt(text[:200]), encoder.clip_ids(text[:8].replace("<", ""))
    assert prompt.input_ids.max() < CONFIG.kosmos_text.vocab_size
    assert 2 <= clip_ids.shape[1] <= 77
    assert encoder.clip_eos_token_id not in clip_ids[0, :-1], (
        "an unknown token, for which CLIP has the id of the end of text"
    )


def test_processors_are_the_same_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from mobile_vla_inference.policy.storage.config import standard_config; "
        "from mobile_vla_inference.policy.synthetic.processors import write_processors; "
        "write_processors(Path(sys.argv[1]), standard_config('tiny', 'hybrid'))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=Path(__file__).parent.parent)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 10
    for name in files:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_downloaded_folders_load_through_the_same_code(tmp_path: Path) -> None:
    """The published Kosmos-2 tokenizer is a SentencePiece Unigram declared as XLMRobertaTokenizer."""
    config = CONFIG
    write_processors(tmp_path / "made", config)
    kosmos, clip = tmp_path / "microsoft" / KOSMOS_FOLDER, tmp_path / "openai" / CLIP_FOLDER
    shutil.copytree(tmp_path / "made" / CLIP_FOLDER, clip)
    (clip / "tokenizer.json").unlink()  # older downloads hold vocab.json and merges.txt alone
    kosmos.mkdir(parents=True)
    raw = _sentencepiece_like_tokenizer()
    raw.save(str(kosmos / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (kosmos / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer", **names}))
    encoder = make_encoder(tmp_path)
    latents = config.latent_query_num
    ids = encoder.prompt("go to the 컵").input_ids[0].tolist()
    text = "<s>" + " ".join(["<image>"] * (1 + latents) + ["</image>"]) + " go to the 컵"
    expected = raw.encode(text, add_special_tokens=False).ids
    assert ids[2 + latents :] == expected[2 + latents :]
    assert raw.decode(ids[3 + latents :]) == "go to the 컵"
    assert torch.equal(encoder.clip_ids(KOREAN[0]), make_encoder(tmp_path / "made").clip_ids(KOREAN[0]))


def _sentencepiece_like_tokenizer() -> Tokenizer:
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    pieces = ["▁go", "▁to", "▁the", "▁컵", "▁", *(f"▁word{index}" for index in range(20))]
    vocabulary = [(piece, -float(rank)) for rank, piece in enumerate([*specials, *pieces])]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False) for tag in KOSMOS_TAGS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path) -> None:
    text = replace(CONFIG.kosmos_text, vocab_size=400)
    with pytest.raises(CheckpointError, match="vocabulary is 400"):
        make_encoder(folder, replace(CONFIG, kosmos_text=text))


@pytest.mark.parametrize(
    ("tower", "name", "damage"),
    [
        *((KOSMOS_FOLDER, "tokenizer.json", damage) for damage in ("missing", "empty", "truncated", "foreign")),
        *((KOSMOS_FOLDER, "tokenizer_config.json", damage) for damage in ("missing", "empty", "truncated")),
        # Without tokenizer.json, CLIP's tokenizer is complete with vocab.json and merges.txt.
        *((CLIP_FOLDER, "tokenizer.json", damage) for damage in ("empty", "truncated", "foreign")),
        *((CLIP_FOLDER, "tokenizer_config.json", damage) for damage in ("missing", "empty", "truncated")),
    ],
)
def test_a_damaged_processor_file_is_named(folder: Path, tmp_path: Path, tower: str, name: str, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / tower / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "foreign": b"{}"}[damage])
    with pytest.raises(CheckpointError, match=tower) as error:
        make_encoder(copy)
    assert "\n" not in str(error.value)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("tower", [KOSMOS_FOLDER, CLIP_FOLDER])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
)
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkfifo, "is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.write_bytes(b'{"a":' * 100_000 + b"\xff"), "nested more than|is not UTF-8"),
    ],
)
def test_a_special_or_hostile_processor_file_is_refused_without_waiting(
    folder: Path, tmp_path: Path, tower, name, make, sentence
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / tower / name).unlink(missing_ok=True)
    make(copy / tower / name)
    with pytest.raises(CheckpointError, match=rf"{name} {sentence}"):
        make_encoder(copy)


def test_a_tokenizer_that_fails_in_encoding_is_refused(folder: Path, monkeypatch) -> None:
    class Panic(BaseException):
        """Like a panic of the tokenizers library: not an Exception."""

    def panic(*_: object, **__: object) -> None:
        raise Panic("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__call__", panic)
    with pytest.raises(CheckpointError, match=r"can't be loaded .called `Option"):
        make_encoder(folder)


def test_a_missing_tokenizer_folder_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / CLIP_FOLDER)
    with pytest.raises(CheckpointError, match=f"openai/{CLIP_FOLDER}"):
        make_encoder(copy)


def test_processors_are_found_next_to_a_file_and_inside_a_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pth"
    with pytest.raises(CheckpointError, match=r"model\.processors"):
        find_processors(checkpoint)
    shared = tmp_path / "processors"
    shared.mkdir()
    assert find_processors(checkpoint) == shared
    own = tmp_path / "model.processors"
    own.mkdir()
    assert find_processors(checkpoint) == own
    assert find_processors(tmp_path) == shared
    assert find_processors(checkpoint, shared) == shared
    with pytest.raises(CheckpointError, match="elsewhere"):
        find_processors(checkpoint, tmp_path / "elsewhere")


@pytest.mark.parametrize("normalization", ["imagenet", "clip"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_pixel_values_equal_the_formula(normalization: str, order: str) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    policy_settings = PolicySettings(image_normalization=normalization, channel_order=order)
    found = FrameNormalizer(policy_settings, "cpu", torch.float32)(frame)
    mean, std = {
        "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    }[normalization]
    pixels = frame if order == "rgb" else frame[..., ::-1]
    expected = ((pixels / 255.0 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.fixture(scope="module")
def shipped() -> InstructionEncoder:
    """The tokenizers that are bundled with the small policy."""
    config = open_checkpoint(SMALL_POLICY).config
    folders = processor_folders(find_processors(SMALL_POLICY), config)
    return InstructionEncoder(folders, config, load_settings(SMALL_POLICY).settings)


def tokens(encoder: InstructionEncoder, text: str) -> tuple[list[int], list[int]]:
    instruction = check_instruction(text)
    return encoder.prompt(instruction).input_ids.tolist(), encoder.clip_ids(instruction).tolist()


FORMS = ("NFC", "NFD", "NFKC", "NFKD")
#: Byte order mark, soft hyphen, zero-width space, joiners, direction marks, isolates, variation selectors.
INVISIBLE = (
    "\ufeff\u00ad\u200b\u200c\u200d\u2060\u200e\u200f\u061c\u2066\u2069\u202a\u202c\ufe0e\ufe0f\U000e0100\u180e\u034f"
)
SPACES = "\u00a0\u3000\u2009\u202f\t\r\n\u2028\x85"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("instruction", [*KOREAN, *ENGLISH])
def test_an_instruction_in_any_unicode_form_gives_the_same_tokens(shipped, instruction, form) -> None:
    text = unicodedata.normalize(form, instruction)
    assert tokens(shipped, text) == tokens(shipped, instruction)
    for extra in INVISIBLE:
        assert tokens(shipped, f"{extra}{text[:3]}{extra}{text[3:]}{extra}") == tokens(shipped, instruction)
    for space in SPACES:
        assert tokens(shipped, f"{space}{text.replace(' ', space * 2)}{space}") == tokens(shipped, instruction)


def test_half_and_full_width_input_gives_the_plain_text(shipped) -> None:
    full = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in "go to the cup, then stop!").replace(
        " ", "\u3000"
    )
    assert tokens(shipped, full) == tokens(shipped, "go to the cup, then stop!")
    assert check_instruction("\uffa1\uffc2 \u3131\u314f") == "\uac00 \uac00"  # half-width and lone jamo


TEXT = st.text(st.characters(exclude_categories=("Cs", "Co", "Cn")), max_size=60)
KOREAN_TEXT = st.text(
    st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3) | st.sampled_from(" ,.0123abc"), max_size=40
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT | KOREAN_TEXT, form=st.sampled_from(FORMS), where=st.integers(0, 60), extra=st.sampled_from(INVISIBLE))
def test_texts_that_look_the_same_are_one_instruction(shipped, text, form, where, extra) -> None:
    try:
        instruction = check_instruction(text)
    except InstructionError:
        assert {"\u202d", "\u202e", "\ufffd"} & set(text)
        return
    assert check_instruction(instruction) == instruction
    assert check_instruction(unicodedata.normalize(form, text)) == instruction
    assert check_instruction(text[:where] + extra + text[where:]) == instruction
    assert all(c.isprintable() and c not in INVISIBLE for c in instruction)
    assert tokens(shipped, unicodedata.normalize(form, text)) == tokens(shipped, text)


@settings(max_examples=300)
@given(text=st.text())
def test_any_text_is_an_instruction_or_an_instruction_error(text: str) -> None:
    try:
        instruction = check_instruction(text)
    except InstructionError as error:
        assert str(error).isprintable()
        return
    assert instruction == check_instruction(instruction)
    instruction.encode("utf-8")


@pytest.mark.parametrize(
    ("character", "sentence"),
    [
        ("\u202e", r"U\+202E, which changes the order in which the text is shown"),
        ("\u202d", r"U\+202D, which changes the order in which the text is shown"),
        ("\ue000", r"U\+E000, which is reserved for private use"),
        ("\U0010fffd", r"U\+10FFFD, which is reserved for private use"),
        ("\ud800", r"U\+D800, which is half of a pair \(not UTF-8\)"),
        ("\udcff", r"U\+DCFF, which is half of a pair \(not UTF-8\)"),  # a byte of the command line that is not UTF-8
        ("\uffff", r"U\+FFFF, which is not assigned"),
        ("\u0378", r"U\+0378, which is not assigned"),
        ("\ufffd", "bytes that are not UTF-8"),
    ],
)
def test_a_character_that_is_not_text_is_refused_with_its_code_point(character: str, sentence: str) -> None:
    with pytest.raises(InstructionError, match=sentence):
        check_instruction(f"go to {character} the cup")


def test_a_text_that_normalisation_makes_too_long_is_refused() -> None:
    with pytest.raises(InstructionError, match="bytes long, expected at most 4096"):
        check_instruction("\ufdfa" * 300)


@pytest.mark.parametrize("text", ["", " ", "\ufeff", "\u200b\u00ad", "\r\n", "\x00", "\u3164"])
def test_a_text_without_visible_characters_is_empty(text: str) -> None:
    assert check_instruction(text) == ""
