"""Read the index of a folder of safetensors shards; no tensor data is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.outside_files import read_json
from mobile_vla_inference.policy.storage.formats.damage import DAMAGED
from mobile_vla_inference.policy.storage.formats.safetensors_file import MAX_HEADER_BYTES, read_safetensors
from mobile_vla_inference.policy.storage.tensor_index import TensorEntry, TensorIndex, policy_index

SHARD_INDEX_FILE = "model.safetensors.index.json"

_MAX_SHARDS = 10_000


def read_folder(folder: Path) -> TensorIndex:
    """Read a folder of safetensors files: the shards that its index names, or all files if it has no index."""
    weight_map = _read_weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map else sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".pt"))
        hint = f"give the file itself: {folder / others[0]}" if others else "check the path"
        raise CheckpointError(f"{folder} is a folder without safetensors files, expected a converted one; {hint}")
    if len(names) > _MAX_SHARDS:
        raise CheckpointError(
            f"{folder} has {len(names)} safetensors files, expected at most {_MAX_SHARDS}; give a folder with one model"
        )
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, Any] = {}
    total = 0
    for name in names:
        shard = folder / name
        if not shard.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its index names, expected all shards; copy it again")
        with shard.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found, values = read_safetensors(shard, file, size)
        twice = tensors.keys() & found.keys()
        if twice:
            raise CheckpointError(
                f"{folder} holds {min(twice)} in two files, expected each once; remove the files of another model"
            )
        total += size
        tensors.update(found)
        metadata.update(values)
    if weight_map:
        actual = {name: entry.file.name for name, entry in tensors.items()}
        wrong = sorted(actual.items() ^ weight_map.items())
        if wrong:
            raise CheckpointError(
                f"{folder / SHARD_INDEX_FILE} and the shards disagree on {wrong[0][0]}, expected each tensor in the "
                f"file that the index names; copy the folder again"
            )
    return policy_index(folder, "sharded safetensors", total, tensors, metadata=metadata)


def _read_weight_map(folder: Path) -> dict[str, str]:
    path = folder / SHARD_INDEX_FILE
    if not (path.is_symlink() or path.exists()):  # a link to nothing is reported by read_json
        return {}
    content = read_json(path, "the index of safetensors files", MAX_HEADER_BYTES, error=CheckpointError)
    try:
        weight_map = content["weight_map"]
        names = list(weight_map.values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("no weight_map with names of files in this folder")
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} is damaged ({str(error)[:120]}), expected JSON with a weight_map; copy the folder again"
        ) from error
    return weight_map
