"""config.json of a converted folder: its architecture, and where its weights come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mobile_vla_inference import __version__
from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import read_json
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.conversion.plan import OTHER_DTYPE_OF_INT8
from mobile_vla_inference.policy.storage.layout import parameter_counts, tensor_shapes
from mobile_vla_inference.policy.storage.tensor_index import SCALE_SUFFIX, TensorIndex

CONFIG_FILE = "config.json"

_MODEL_TYPE = "mobile_vla"

#: Largest config.json of a converted folder.
_MAX_CONFIG_BYTES = 4 << 20


def is_converted(file: Path) -> bool:
    """Return whether convert wrote a config.json; raise CheckpointError if it can't be read."""
    content = read_json(file, "what convert wrote", _MAX_CONFIG_BYTES, error=CheckpointError)
    return isinstance(content, dict) and content.get("model_type") == _MODEL_TYPE


def read_conversion(path: Path, config: HybridConfig) -> dict[str, Any] | None:
    """Return the content of a converted folder's config.json; None if there is none, or another program wrote it.

    Args:
        path: the checkpoint's file or folder.
        config: the sizes that its tensors show.

    Raises:
        CheckpointError: it is damaged, or describes another architecture than the tensors show.
    """
    file = path / CONFIG_FILE
    if not path.is_dir() or not os.path.lexists(file):  # a link to nothing counts as a damaged file
        return None
    try:
        conversion = read_json(file, "what convert wrote", _MAX_CONFIG_BYTES, error=CheckpointError)
        if not isinstance(conversion, dict) or conversion.get("model_type") != _MODEL_TYPE:
            return None
        described = HybridConfig.from_json(conversion["architecture"], str(file))
        layers = [layers[key] for layers in conversion["keep_layers"].values() for key in ("kept", "of")]
        if not isinstance(conversion["training"], dict) or not all(isinstance(count, int) for count in layers):
            raise ValueError("training or keep_layers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} can't be read ({type(error).__name__}: {error}), expected what convert wrote; "
            f"copy the folder again, or convert again"
        ) from error
    if described != config:
        raise CheckpointError(
            f"{file} describes another architecture than the tensors next to it show, expected the shards of one "
            f"conversion; copy the folder again (mobile_vla verify names what differs)"
        )
    return conversion


def conversion_record(
    index: TensorIndex,
    config: HybridConfig,
    *,
    dtype: str,
    quantized_tensors: int,
    keep_layers: Mapping[str, Mapping[str, int]],
    source_sha256: str,
) -> dict[str, Any]:
    """Return the content of config.json for a new converted folder.

    Args:
        index: of the checkpoint that was converted.
        config: sizes of the converted policy.
        dtype: data type of the weights, one of plan.DTYPES.
        quantized_tensors: number of int8 matrices.
        keep_layers: towers that lost layers: how many layers are `kept`, `of` how many.
        source_sha256: hash of the checkpoint that was converted.
    """
    quantization = {
        "scheme": "symmetric, per output channel, weights only",
        "bits": 8,
        "tensors": quantized_tensors,
        "scale_suffix": SCALE_SUFFIX,
        "other_dtype": OTHER_DTYPE_OF_INT8,
    }
    return {
        "model_type": _MODEL_TYPE,
        "format": 1,
        "variant": config.variant,
        "architecture": config.to_json(),
        "parameters": sum(parameter_counts(tensor_shapes(config)).values()),
        "dtype": dtype,
        "quantization": quantization if dtype == "int8" else None,
        "keep_layers": keep_layers,
        "training": index.metadata,
        "source": {"name": index.path.name, "bytes": index.file_size, "sha256": source_sha256},
        "converted": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "version": __version__,
        },
    }
