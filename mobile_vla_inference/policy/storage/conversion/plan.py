"""Which tensors a converted folder holds, in which data types, and how they are divided into shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.conversion.safetensors_writer import TensorSpec, in_aligned_order
from mobile_vla_inference.policy.storage.layout import is_block_matrix, tensor_shapes
from mobile_vla_inference.policy.storage.tensor_index import SCALE_SUFFIX, TensorEntry, TensorIndex
from mobile_vla_inference.policy_facts import FLOAT_DTYPES

#: Number types that convert can write.
DTYPES = (*FLOAT_DTYPES, "int8")

#: Number type of the tensors that int8 leaves alone: embeddings, norms, biases, fusion, cell and head.
OTHER_DTYPE_OF_INT8 = "float16"

_SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Output:
    """A tensor of the new files: a tensor of the source in another type, or the scales of its rows."""

    spec: TensorSpec
    source_name: str
    entry: TensorEntry

    @property
    def is_scale(self) -> bool:
        """Whether it holds scales."""
        return self.spec.name != self.source_name


def plan_shards(index: TensorIndex, config: HybridConfig, dtype: str) -> list[list[Output]]:
    """Return the tensors of each shard, in the order of the source as far as shards and alignment allow.

    Args:
        index: of the source.
        config: sizes of the converted policy; the source can have more layers.
        dtype: one of DTYPES.
    """
    return list(_shards(index, config, dtype))


def _shards(index: TensorIndex, config: HybridConfig, dtype: str) -> Iterator[list[Output]]:
    kept = tensor_shapes(config)
    entries = index.tensors.items()
    ordered = sorted((item for item in entries if item[0] in kept), key=lambda item: (item[1].file, item[1].offset))
    shard: list[Output] = []
    size = 0
    for name, entry in ordered:
        outputs = _outputs(name, entry, dtype)
        added = sum(output.spec.nbytes for output in outputs)
        if shard and size + added > _SHARD_BYTES:
            yield _aligned(shard)
            shard, size = [], 0
        shard += outputs
        size += added
    yield _aligned(shard)


def _outputs(name: str, entry: TensorEntry, dtype: str) -> list[Output]:
    if dtype != "int8":
        return [Output(TensorSpec(name, dtype, entry.shape), name, entry)]
    if not is_block_matrix(name):
        return [Output(TensorSpec(name, OTHER_DTYPE_OF_INT8, entry.shape), name, entry)]
    scale = TensorSpec(name + SCALE_SUFFIX, "float32", entry.shape[:1])
    return [Output(TensorSpec(name, "int8", entry.shape), name, entry), Output(scale, name, entry)]


def _aligned(shard: list[Output]) -> list[Output]:
    by_name = {output.spec.name: output for output in shard}
    return [by_name[spec.name] for spec in in_aligned_order(output.spec for output in shard)]
