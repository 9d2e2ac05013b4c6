"""The arithmetic and the weights of a policy step, by its sizes, and the time that a machine's limits allow.

A projection for a machine is its roofline: the larger of the time to read the weights once and the time for the
arithmetic at the full rate of its matrix units. No program reaches it, and it uses no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mobile_vla_inference.policy.storage.config import HybridConfig, TextTower, VisionTower


@dataclass(frozen=True)
class StepCost:
    """Cost of one step at batch 1, without the work for a new instruction.

    Attributes:
        flops: multiplications and additions.
        block_weights: weights of the matrices that int8 applies to: blocks of the towers, and the resampler.
        other_weights: weights of fusion, recurrent cell, head and patches.
    """

    flops: int
    block_weights: int
    other_weights: int

    @property
    def weights(self) -> int:
        """All weights that a step reads."""
        return self.block_weights + self.other_weights


@dataclass(frozen=True)
class MachineLimits:
    """Rates that the manufacturer states.

    Attributes:
        name: of the machine.
        bandwidth_gbps: of its memory, GB/s.
        fp16_tflops: dense products of 16-bit numbers, fp32 sums.
        int8_tops: dense products of int8 numbers.
    """

    name: str
    bandwidth_gbps: float
    fp16_tflops: float
    int8_tops: float


ORIN_NX_16GB = MachineLimits("Jetson Orin NX 16 GB", bandwidth_gbps=102.4, fp16_tflops=15.0, int8_tops=30.0)


def step_cost(config: HybridConfig, fusion_features: Iterable[str], tokens: int) -> StepCost:
    """Count the cost of a step.

    Args:
        config: the sizes of the checkpoint.
        fusion_features: names of the features that it joins.
        tokens: tokens of the prompt, those of the image included.
    """
    used = set(fusion_features)
    flops = block_weights = other_weights = 0

    def add(rows: int, weights: int, in_block: bool) -> None:
        nonlocal flops, block_weights, other_weights
        flops += 2 * rows * weights
        if in_block:
            block_weights += weights
        else:
            other_weights += weights

    def add_vision(tower: VisionTower) -> int:
        nonlocal flops
        patches = (tower.image_size // tower.patch_size) ** 2
        add(patches, 3 * tower.patch_size**2 * tower.hidden_size, False)
        add(1 + patches, tower.num_layers * _block_weights(tower), True)
        flops += tower.num_layers * 4 * (1 + patches) ** 2 * tower.hidden_size
        return 1 + patches

    if used & {"kosmos_text", "kosmos_vision"}:
        rows = add_vision(config.kosmos_vision)
    if "kosmos_text" in used:
        text, latents = config.kosmos_text, config.latent_query_num
        add(rows, config.kosmos_vision.hidden_size * text.hidden_size, True)
        add(rows, 2 * text.hidden_size**2, True)  # keys and values; those of the latents are constant
        add(latents, text.hidden_size**2, True)
        add(tokens, text.num_layers * _block_weights(text), True)
        attended = latents * (rows + latents) + text.num_layers * tokens**2
        flops += 4 * attended * text.hidden_size
    if used & {"clip_image", "clip_vision_hidden"}:
        add_vision(config.clip_vision)
        add(1, config.clip_vision.hidden_size * config.clip_projection_dim, False)
    if config.fusion_in is not None:
        add(1, config.fusion_in * config.fusion_out, False)
    cell = config.cell
    inputs = cell.input_size + (cell.num_layers - 1) * cell.hidden_size + cell.num_layers * cell.hidden_size
    add(1, cell.gate_rows * inputs, False)
    add(1, sum(math.prod((h.in_features, h.out_features)) for h in config.head if h.kind == "linear"), False)
    return StepCost(flops, block_weights, other_weights)


def project(cost: StepCost, limits: MachineLimits) -> dict[str, dict[str, float | str]]:
    """Return precision -> what a machine's limits allow at best: `step_ms`, `rate_hz` and `limited_by`."""
    sixteen_bit = 2 * cost.weights
    int8 = cost.block_weights + 2 * cost.other_weights
    return {
        "float16": _roofline(sixteen_bit, cost.flops / limits.fp16_tflops, limits),
        "int8 weights": _roofline(int8, cost.flops / limits.fp16_tflops, limits),
        "int8 weights and activations": _roofline(int8, cost.flops / limits.int8_tops, limits),
    }


def _block_weights(tower: TextTower | VisionTower) -> int:
    return 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size


def _roofline(weight_bytes: int, flops_per_tera: float, limits: MachineLimits) -> dict[str, float | str]:
    reading_ms = weight_bytes / limits.bandwidth_gbps / 1e6
    arithmetic_ms = flops_per_tera / 1e9
    step_ms = max(reading_ms, arithmetic_ms)
    limit = "memory" if reading_ms >= arithmetic_ms else "arithmetic"
    return {"step_ms": step_ms, "rate_hz": 1e3 / step_ms, "limited_by": limit}
