"""From a reduced camera frame and an instruction to the tensors that the model reads.

The layout of Kosmos-2's tokens is that of its own processor: `<s> <image>`, one position per image latent, `</image>`,
then the instruction. CLIP's text tower gets the instruction alone. Both tokenizers are loaded from local folders in
Hugging Face's layout, never from the network.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mobile_vla_inference.errors import CheckpointError, InstructionError
from mobile_vla_inference.outside_files import read_json, read_text
from mobile_vla_inference.policy.storage.checkpoint_files import IMAGE_END, IMAGE_START, KOSMOS_TAGS, ProcessorFolders
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.settings import IMAGE_NORMALIZATIONS, PolicySettings

_LOG = logging.getLogger(__name__)

#: Positions of Kosmos-2's training (`max_position_embeddings`); longer prompts are refused.
MAX_PROMPT_TOKENS = 2048

#: Largest accepted file of a processor; Kosmos-2's tokenizer.json has 8 MB.
_MAX_FILE_BYTES = 64 << 20

#: Suffixes of the files in a processor's folder that the libraries can read.
_TEXT_SUFFIXES = (".json", ".txt", ".jinja")


@dataclass(frozen=True)
class Prompt:
    """The input of Kosmos-2's text decoder, each part [batch, tokens], int64.

    Attributes:
        input_ids: token ids; those at the image's positions are placeholders.
        attention_mask: 1 where a token is valid.
        image_embeds_position_mask: 1 where an image latent replaces the token's embedding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    image_embeds_position_mask: torch.Tensor

    def to(self, device: torch.device | str) -> Prompt:
        """Return the prompt on `device`."""
        return Prompt(*(part.to(device) for part in self._parts()))

    def expand(self, batch: int) -> Prompt:
        """Return a prompt of one row repeated `batch` times (without a copy)."""
        return Prompt(*(part.expand(batch, -1) for part in self._parts()))

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.input_ids, self.attention_mask, self.image_embeds_position_mask


@dataclass(frozen=True)
class PixelScaling:
    """Maps a pixel to the input of the towers: value * factor + shift, per channel of the model.

    Attributes:
        factor: [3].
        shift: [3].
        reverse: whether the model's channel order is blue, green, red.
    """

    factor: tuple[float, float, float]
    shift: tuple[float, float, float]
    reverse: bool

    @classmethod
    def of(cls, settings: PolicySettings) -> PixelScaling:
        """Return the scaling that the settings give."""
        mean, std = IMAGE_NORMALIZATIONS[settings.image_normalization]
        return cls(
            factor=tuple(1.0 / (255.0 * each) for each in std),
            shift=tuple(-middle / each for middle, each in zip(mean, std)),
            reverse=settings.channel_order == "bgr",
        )


class FrameNormalizer:
    """Turns reduced frames into pixel values: channel order, [0, 1], mean and standard deviation of the settings."""

    def __init__(self, settings: PolicySettings, device: torch.device | str, dtype: torch.dtype) -> None:
        mean, std = IMAGE_NORMALIZATIONS[settings.image_normalization]
        self.device = torch.device(device)
        self.dtype = dtype
        self._mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(std, device=device).view(3, 1, 1)
        self._reverse = settings.channel_order == "bgr"

    def __call__(self, frame: np.ndarray) -> torch.Tensor:
        """Normalise one frame, uint8 RGB [side, side, 3], to pixel values [1, 3, side, side]."""
        pixels = torch.tensor(frame, device=self.device)  # a copy: the frame can be read-only or in shared memory
        if self._reverse:
            pixels = pixels.flip(-1)
        pixels = pixels.permute(2, 0, 1).to(torch.float32) / 255.0
        return ((pixels - self._mean) / self._std).to(self.dtype).unsqueeze(0)


class InstructionEncoder:
    """Turns an instruction into Kosmos-2's prompt and CLIP's token ids.

    Attributes:
        clip_eos_token_id: end-of-text id of CLIP's tokenizer; None if the checkpoint has no CLIP text tower.
    """

    def __init__(self, folders: ProcessorFolders, config: HybridConfig, settings: PolicySettings) -> None:
        """Load the tokenizers that the checkpoint needs.

        Raises:
            CheckpointError: a folder or file is missing or broken, or its token ids exceed the model's vocabulary.
        """
        self._template = settings.prompt
        self._latents = config.latent_query_num
        self._kosmos = _load_kosmos_tokenizer(folders.kosmos)
        _check_vocabulary(self._kosmos, config.kosmos_text.vocab_size, folders.kosmos, "Kosmos-2")
        self._first_image_id = self._kosmos.unk_token_id + 1
        if self._first_image_id + self._latents > config.kosmos_text.vocab_size:
            raise CheckpointError(
                f"{folders.kosmos} puts the image's positions at ids {self._first_image_id} to "
                f"{self._first_image_id + self._latents - 1}, expected less than the vocabulary of "
                f"{config.kosmos_text.vocab_size}; use the processor of this checkpoint"
            )
        self._clip: PreTrainedTokenizerBase | None = None
        self.clip_eos_token_id: int | None = None
        if config.clip_text is not None:
            self._clip = _load_clip_tokenizer(folders.clip)
            _check_vocabulary(self._clip, config.clip_text.vocab_size, folders.clip, "CLIP")
            self._clip_max_tokens = config.clip_text.max_positions
            self.clip_eos_token_id = self._clip.eos_token_id

    def prompt(self, instruction: str) -> Prompt:
        """Return the tokens of one step in the layout of Kosmos-2's processor.

        Raises:
            InstructionError: there are too many tokens.
        """
        tokenizer, latents = self._kosmos, self._latents
        text = self._template.replace("{instruction}", instruction).strip()
        image = " ".join([IMAGE_START] * (1 + latents) + [IMAGE_END])
        ids = tokenizer(f"{tokenizer.bos_token}{image} {text}", add_special_tokens=False).input_ids
        if len(ids) > MAX_PROMPT_TOKENS:
            raise InstructionError(
                f"instruction gives {len(ids)} Kosmos-2 tokens, expected at most {MAX_PROMPT_TOKENS}; send a sentence"
            )
        start = 2  # after <s> <image>
        ids[start : start + latents] = range(self._first_image_id, self._first_image_id + latents)
        input_ids = torch.tensor([ids])
        image_mask = torch.zeros_like(input_ids)
        image_mask[:, start : start + latents] = 1
        return Prompt(input_ids, torch.ones_like(input_ids), image_mask)

    def clip_ids(self, instruction: str) -> torch.Tensor | None:
        """Return CLIP's token ids [1, tokens], start and end of text included; None without a CLIP text tower.

        An instruction that is longer than the tower's positions (77) is cut, with a warning.
        """
        if self._clip is None:
            return None
        ids = self._clip(instruction, verbose=False).input_ids
        if len(ids) > self._clip_max_tokens:
            _LOG.warning(
                "CLIP reads only %d of the %d tokens of the instruction %r; send a shorter one",
                self._clip_max_tokens,
                len(ids),
                instruction,
            )
            ids = [*ids[: self._clip_max_tokens - 1], self._clip.eos_token_id]
        return torch.tensor([ids])


def _load_kosmos_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load tokenizer.json with the class that transformers uses for the model type kosmos-2."""
    _check_files(folder, ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = _load(PreTrainedTokenizerFast, folder)
    for name in ("bos_token", "unk_token"):
        if getattr(tokenizer, name) is None:
            raise CheckpointError(
                f"{folder} has no {name}, expected Kosmos-2's tokenizer; use the processor of this checkpoint"
            )
    # As in Kosmos2Processor: a tag removes the white space before it.
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, rstrip=False, normalized=False) for tag in KOSMOS_TAGS])
    return tokenizer


def _load_clip_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer.json").exists():
        _check_files(folder, ("tokenizer.json", "tokenizer_config.json"))
    else:
        _check_files(folder, ("vocab.json", "merges.txt", "tokenizer_config.json"))
    tokenizer = _load(AutoTokenizer, folder)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder} has no eos_token, expected CLIP's tokenizer; use CLIP's processor")
    return tokenizer


def _load(loader: type, folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("go to the cup", verbose=False)  # a tokenizer can load and still be unable to encode
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself; Rust's panics derive from BaseException
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the tokenizer in {folder} can't be loaded ({reason}), expected Hugging Face's files; download it again"
        ) from error
    return tokenizer


def _check_files(folder: Path, names: tuple[str, ...]) -> None:
    """Raise CheckpointError unless the named files and every other file that the libraries can read are usable.

    The libraries would wait for a named pipe, and would read a file of any size and depth.
    """
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _TEXT_SUFFIXES)
    what = f"a processor's file ({', '.join(names)})"
    for name in dict.fromkeys([*names, *others]):
        path = folder / name
        if path.suffix == ".json":
            read_json(path, what, _MAX_FILE_BYTES, error=CheckpointError)
        else:
            read_text(path, what, _MAX_FILE_BYTES, error=CheckpointError)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, folder: Path, model: str) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{folder} has token ids up to {largest}, but the checkpoint's {model} vocabulary is {vocab_size}; "
            f"use the processor of this checkpoint"
        )
