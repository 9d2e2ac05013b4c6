"""The CPU's packed engine: the same actions as the modules, from weights of 16 and 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mobile_vla_inference.errors import DeviceError
from mobile_vla_inference.policy.convert import convert
from mobile_vla_inference.policy.engines import choice as engine_choice
from mobile_vla_inference.policy.engines import cpu as cpu_engine
from mobile_vla_inference.policy.engines.cpu import PackedLinear
from mobile_vla_inference.policy.engines.operations import Linear, TorchOperations
from mobile_vla_inference.policy.engines.quantize import quantize, row_scales
from mobile_vla_inference.policy.vla_policy import VlaPolicy

INSTRUCTION = "go around the box on the left to the cup"

needs_packing = pytest.mark.skipif(not cpu_engine.can_pack(), reason="this torch has no packed products")


def frames(policy: VlaPolicy, count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    side = policy.config.image_size
    return [generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def features(policy: VlaPolicy, count: int = 4) -> np.ndarray:
    policy.set_instruction(INSTRUCTION)
    return np.array([policy.engine.features(frame) for frame in frames(policy, count)])


def actions(policy: VlaPolicy, count: int = 4) -> np.ndarray:
    policy.set_instruction(INSTRUCTION)
    policy.reset()
    return np.array([policy.step(frame).values for frame in frames(policy, count)])


@pytest.fixture
def packed_linears(monkeypatch) -> list[PackedLinear]:
    """Pack the tiny matrices of the tests too; return those that were packed."""
    packed: list[PackedLinear] = []

    def recorded(pack: Callable[[Linear], PackedLinear]) -> Callable[[Linear], PackedLinear]:
        def pack_and_record(linear: Linear) -> PackedLinear:
            packed.append(pack(linear))
            return packed[-1]

        return pack_and_record

    monkeypatch.setattr(cpu_engine, "SMALLEST_PACKED", 1)
    for name in ("pack_float16", "pack_int8"):
        monkeypatch.setattr(cpu_engine, name, recorded(getattr(cpu_engine, name)))
    return packed


@needs_packing
def test_a_16_bit_folder_gives_the_actions_of_its_own_weights(tiny_checkpoint, tmp_path, packed_linears) -> None:
    convert(tiny_checkpoint, tmp_path / "fp16", dtype="float16")
    packed = VlaPolicy.load(tmp_path / "fp16", device="cpu", dtype="float16")
    assert packed.describe().engine == "packed" and packed.describe().engine_fallback == ""
    exact = VlaPolicy.load(tmp_path / "fp16", device="cpu", dtype="float32", engine="eager")
    np.testing.assert_allclose(actions(packed), actions(exact), atol=1e-4)
    assert np.abs(actions(packed) - actions(exact)[::-1]).max() > 1e-2  # the frames make a difference


@needs_packing
def test_int8_keeps_the_features(tiny_checkpoint, tmp_path, packed_linears) -> None:
    convert(tiny_checkpoint, tmp_path / "int8", dtype="int8")
    packed = VlaPolicy.load(tmp_path / "int8", device="cpu")
    assert packed.describe().engine == "packed"
    assert any(linear.is_int8 for linear in packed_linears)
    ours, exact = features(packed), features(VlaPolicy.load(tiny_checkpoint, device="cpu", engine="eager"))
    cosines = (ours * exact).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosines.min() > 0.98  # rows of 64 numbers; the error of the published sizes is far smaller
    ours_shuffled = np.roll(ours, 1, axis=1)
    assert ((ours_shuffled * exact).sum(axis=1) / np.linalg.norm(ours, axis=1)).max() < 0.5 * np.linalg.norm(exact)


@needs_packing
def test_a_row_of_large_values_does_not_reduce_the_precision_of_the_others() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    scale = row_scales(linear.weight.detach())
    plain = Linear(quantize(linear.weight.detach(), scale), linear.bias.detach(), scale)
    rows = torch.randn(3, 64)
    rows[1] *= 1e4
    rows[2] = 0.0
    expected = TorchOperations(torch.float32).linear(rows, plain)
    error = cpu_engine.CpuOperations().linear(rows, cpu_engine.pack_int8(plain)) - expected
    assert (error.norm(dim=1) <= 0.03 * expected.norm(dim=1)).all()


@needs_packing
def test_a_weight_beyond_fp16_stays_as_it_is() -> None:
    linear = Linear(torch.tensor([[1e5, 0.0], [0.0, 1.0]]), None)
    assert cpu_engine.pack_float16(linear) is linear


@needs_packing
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_step_reads_fewer_bytes_of_packed_weights(tiny_checkpoint, tmp_path, dtype, packed_linears) -> None:
    plain = VlaPolicy.load(tiny_checkpoint, device="cpu", engine="flat").engine
    assert not packed_linears
    convert(tiny_checkpoint, tmp_path / dtype, dtype=dtype)
    packed = VlaPolicy.load(tmp_path / dtype, device="cpu", engine="packed").engine
    linears = [linear for linear in packed_linears if linear.is_int8 == (dtype == "int8")]
    saved = plain.flat.weight_bytes - packed.flat.weight_bytes
    assert saved >= sum((3 if linear.is_int8 else 2) * linear.weight.numel() for linear in linears) > 0


def test_without_packing_the_flat_engine_is_taken_and_reported(tiny_checkpoint, monkeypatch, caplog) -> None:
    monkeypatch.setattr(engine_choice, "can_pack", lambda: False)
    policy = VlaPolicy.load(tiny_checkpoint, device="cpu", dtype="float16")
    assert policy.describe().engine == "flat"
    assert "packed does not run here" in policy.describe().engine_fallback
    assert "packed does not run here" in caplog.text
    with pytest.raises(DeviceError, match="use engine flat"):
        VlaPolicy.load(tiny_checkpoint, device="cpu", engine="packed")


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8)]
)
def test_threads_stay_within_the_cgroups_quota(tmp_path: Path, monkeypatch, quota: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cpu_engine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cpu_engine.thread_count() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert cpu_engine.thread_count() == 8
