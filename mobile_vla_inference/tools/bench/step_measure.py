"""The measurements of `mobile_vla bench step`: a step, its floor, its memory, and the comparisons."""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobile_vla_inference.frames import list_frames, read_image, reduce_frame
from mobile_vla_inference.policy.vla_policy import VlaPolicy
from mobile_vla_inference.tools.bench.machine import describe_machine, read_memory_mib
from mobile_vla_inference.tools.bench.step_cost import ORIN_NX_16GB, project, step_cost
from mobile_vla_inference.tools.bench.step_parity import compare, soak, trace
from mobile_vla_inference.tools.bench.step_timing import (
    bandwidth_gbps,
    instruction_times_ms,
    part_times_ms,
    step_times_ms,
    synthetic_frames,
)
from mobile_vla_inference.tools.loading import load_policy
from mobile_vla_inference.units import MIB

_INSTRUCTION = "go around the box on the left to the cup"
#: Name of a change of the instruction -> the new text; the first has as many tokens as the one in force.
_OTHER_INSTRUCTIONS = {
    "same length": "go around the box on the right to the cup",
    "another length": "go to the cup",
    "a known length": _INSTRUCTION,
}
_FRAMES = 100
_STOCK_FRACTION = 4  # with the stock modules, so many times fewer steps are timed
_STOCK_STEPS_FROM = 3
_GROWTH_LIMIT_MIB = 16.0  # allocators round up


def measure_step(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Measure what the options of `mobile_vla bench step` ask for; return a JSON-ready report."""
    report: dict[str, Any] = {"machine": describe_machine(), "torch": torch.__version__}
    policy = load_policy(args, checkpoint)
    policy.warm_up()
    facts = policy.describe()
    names = ("checkpoint", "parameters", "dtype", "quantization", "device", "engine", "engine_fallback")
    report |= {name: getattr(facts, name) for name in names}
    device = torch.device(facts.device)
    report["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report["threads"] = torch.get_num_threads()
    frames = _frames(args.frames, policy, max(_FRAMES, args.parity or 0))
    report["frames"] = "made up" if args.frames is None else str(args.frames)

    policy.set_instruction(_INSTRUCTION)
    report["step_ms"] = step_times_ms({"step": policy.step}, frames, args.steps)["step"]
    report["memory_mib"] = _memory_mib(device)
    report |= _floor(policy, device, report["step_ms"]["p50"])
    if hasattr(policy.engine, "parts"):
        report["part_ms"] = part_times_ms(policy.engine.parts(frames[0]), device)
    report["instruction_ms"] = instruction_times_ms(policy, _OTHER_INSTRUCTIONS)
    if args.soak is not None:
        report["soak"] = _soak(policy, frames, args.soak, device)
    if args.parity is not None:
        report["parity"] = _parity(policy, args, checkpoint, frames[: args.parity])
    if args.vs is not None:
        report["stock"] = _stock(policy, args, checkpoint, frames)
    return report


def _frames(folder: Path | None, policy: VlaPolicy, number: int) -> list[np.ndarray]:
    side_px = policy.config.image_size
    if folder is None:
        return synthetic_frames(side_px, number)
    paths = list_frames(folder)[:number]
    return [reduce_frame(read_image(path), side_px, policy.settings.image_keep_aspect) for path in paths]


def _memory_mib(device: torch.device) -> dict[str, float]:
    """Return the peaks of the process so far: host memory, and GPU memory that torch took."""
    memory = {f"host {name}": mib for name, mib in read_memory_mib().items()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory["GPU allocated, peak"] = torch.cuda.max_memory_allocated(device) / MIB
        memory["GPU reserved, peak"] = torch.cuda.max_memory_reserved(device) / MIB
        memory["GPU in use by all, context included"] = (total - free) / MIB
    return memory


def _used_mib(device: torch.device) -> float:
    """Return the memory in use now: anonymous memory of the process, and GPU memory if there is a GPU."""
    used = read_memory_mib()["anonymous"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used += (total - free) / MIB
    return used


def _floor(policy: VlaPolicy, device: torch.device, p50_ms: float) -> dict[str, Any]:
    """Return bandwidth, weights and floor of a step, and Orin NX's roofline."""
    tokens = policy.encoder.prompt(_INSTRUCTION).input_ids.shape[1]
    cost = step_cost(policy.config, policy.describe().fusion_features, tokens)
    flat = getattr(policy.engine, "flat", None)
    weight_gb = None if flat is None else flat.weight_bytes / 1e9
    bandwidth = bandwidth_gbps(device)
    floor_ms = None if weight_gb is None else 1e3 * weight_gb / bandwidth
    return {
        "tokens": tokens,
        "gflop": cost.flops / 1e9,
        "gflop_per_s": cost.flops / p50_ms / 1e6,
        "weight_gb": weight_gb,
        "bandwidth_gbps": bandwidth,
        "floor_ms": floor_ms,
        "ratio_to_floor": None if floor_ms is None else p50_ms / floor_ms,
        "projection": {"of": ORIN_NX_16GB.name, "limits": asdict(ORIN_NX_16GB), "best": project(cost, ORIN_NX_16GB)},
    }


def _soak(policy: VlaPolicy, frames: list[np.ndarray], steps: int, device: torch.device) -> dict[str, Any]:
    instructions = [_INSTRUCTION, *_OTHER_INSTRUCTIONS.values()]
    soak(policy, frames, instructions, 100 * len(instructions))  # captures every prompt length before memory is read
    before_mib = _used_mib(device)
    result = soak(policy, frames, instructions, steps)
    growth_mib = _used_mib(device) - before_mib
    passed = result["largest_change"] == 0.0 and growth_mib < _GROWTH_LIMIT_MIB
    return {**result, "memory_growth_mib": growth_mib, "passed": passed}


def _parity(policy: VlaPolicy, args: argparse.Namespace, checkpoint: Path, frames: list[np.ndarray]) -> dict[str, Any]:
    """Compare with the fp32 modules over the same frames, and over shuffled frames, which has to fail."""
    facts = policy.describe()
    precision = "int8" if facts.quantization else facts.dtype
    own = trace(policy, frames, _INSTRUCTION, "parity")
    shuffled = random.Random(0).sample(frames, len(frames))
    own_shuffled = trace(policy, shuffled, _INSTRUCTION, "shuffled")
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the reference is fp32 throughout
    try:
        reference = load_policy(args, args.reference or checkpoint, dtype="float32", engine="eager")
        expected = trace(reference, frames, _INSTRUCTION, "fp32 modules")
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    result = compare(own, expected, precision)
    shuffled_result = compare(own_shuffled, expected, precision)
    result["shuffled_error"] = shuffled_result["largest_error"]
    result["passed"] = result["passed"] and not shuffled_result["passed"]
    return result


def _stock(policy: VlaPolicy, args: argparse.Namespace, checkpoint: Path, frames: list[np.ndarray]) -> dict[str, Any]:
    """Time the stock modules of transformers in turns with the policy: in the same type, on a CPU in fp32."""
    facts = policy.describe()
    dtype = "float32" if facts.device == "cpu" else facts.dtype  # 16 bits would be slower still
    source = args.reference or checkpoint
    stock = load_policy(args, source, dtype=dtype, engine="eager")
    policy.set_instruction(_INSTRUCTION)
    stock.set_instruction(_INSTRUCTION)
    prompt = (stock.encoder.prompt(_INSTRUCTION), stock.encoder.clip_ids(_INSTRUCTION))

    def uncached(frame: np.ndarray) -> None:
        stock.engine.set_instruction(*prompt)
        stock.step(frame)

    ways = {"own": policy.step, "cached": stock.step, "uncached": uncached}
    times = step_times_ms(ways, frames, max(_STOCK_STEPS_FROM, args.steps // _STOCK_FRACTION))
    ratios = {f"ratio_{name}": times[name]["p50"] / times["own"]["p50"] for name in ("cached", "uncached")}
    return {"dtype": dtype, **times, **ratios}
