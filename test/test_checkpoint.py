"""Loading: every member's weights arrive unchanged, mapped or cast, within the memory promised; and inspect."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import BAD_FILES, members_with_features, prefixes, saved, wrap, wrappers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy import checkpoint as checkpoint_module
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.checkpoint import available_bytes, copied_bytes, load_model, open_checkpoint
from mobile_vla_inference.policy.storage.config import HybridConfig, PolicySettings, family_member
from mobile_vla_inference.policy.storage.layout import tensor_shapes
from mobile_vla_inference.policy.storage.settings_file import load_settings, save_settings
from mobile_vla_inference.policy.synthetic.checkpoint import make_checkpoint
from mobile_vla_inference.tools import inspect
from mobile_vla_inference.units import MIB

TINY = family_member("tiny", "hybrid")


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    make_checkpoint(path, TINY, seed=1)
    return path


def _reference(path: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)["model_state_dict"]


def _random_state(config: HybridConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in tensor_shapes(config).items()}


def _lies_in_mapping_of(tensor: torch.Tensor, path: Path) -> bool:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, name = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in span.split("-"))
        if name == str(path) and first <= tensor.data_ptr() < last:
            return True
    return False


def test_fp32_on_the_cpu_stays_mapped(tiny_path: Path) -> None:
    model = load_model(tiny_path)
    expected = _reference(tiny_path)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(_lies_in_mapping_of(parameter, tiny_path) for parameter in model.parameters())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert all(tensor.device.type == "cpu" for tensor in model.buffers())
    assert copied_bytes(open_checkpoint(tiny_path), "cpu", "float32") == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_copies_each_tensor(tiny_path: Path, dtype: torch.dtype) -> None:
    model = load_model(tiny_path, dtype=dtype)
    state = model.state_dict()
    for name, tensor in _reference(tiny_path).items():
        assert torch.equal(state[name], tensor.to(dtype)), name
    assert not any(_lies_in_mapping_of(parameter, tiny_path) for parameter in model.parameters())
    weights, largest = copied_bytes(open_checkpoint(tiny_path), "cpu", str(dtype).removeprefix("torch."))
    assert weights == sum(tensor.nbytes for tensor in state.values())
    assert largest == max(tensor.nbytes for tensor in state.values())


def test_a_mapped_file_is_never_written(tiny_path: Path) -> None:
    before = tiny_path.read_bytes()
    model = load_model(tiny_path)
    with torch.no_grad():
        model.rnn.bias_ih_l0.fill_(7.0)
    assert tiny_path.read_bytes() == before


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    member=members_with_features(),
    prefix=prefixes,
    wrapper=wrappers,
    seed=st.integers(0, 99),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    as_safetensors=st.booleans(),
)
def test_any_member_loads_and_acts_as_its_source(
    tmp_path: Path,
    member: tuple[HybridConfig, tuple[str, ...]],
    prefix: str,
    wrapper: str | None,
    seed: int,
    dtype: torch.dtype,
    as_safetensors: bool,
) -> None:
    config, features = member
    policy_settings = PolicySettings(fusion_features=features)
    state = _random_state(config, seed, dtype)
    path = tmp_path / ("a.safetensors" if as_safetensors else "a.pth")
    if as_safetensors:
        save_file(wrap(state, prefix, None), path)
    else:
        path.write_bytes(saved(wrap(state, prefix, wrapper)))
    source = HybridModel(config, policy_settings).to(dtype)
    source.load_state_dict(state)
    save_settings(path, policy_settings)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config and checkpoint.fusion_features == features
    loaded = load_model(checkpoint)
    assert loaded.dtype == dtype
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    inputs = torch.randn(3, config.cell.input_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, _ = source.float().act(inputs, source.initial_hidden_state())
        found, _ = loaded.float().act(inputs, loaded.initial_hidden_state())
    torch.testing.assert_close(found, expected)  # not to the bit: how memory is aligned decides the order of sums


def test_tensors_at_odd_offsets_and_transposed_ones_load(tmp_path: Path) -> None:
    state = _random_state(family_member("tiny", "pure"), 3)
    name = "kosmos_model.image_to_text_projection.x_attn.k_proj.weight"
    (tmp_path / "strided.pth").write_bytes(saved(state | {name: state[name].t().contiguous().t()}))
    save_file(state, tmp_path / "odd.safetensors")
    data = (tmp_path / "odd.safetensors").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    odd = (header_bytes + 1).to_bytes(8, "little") + data[8 : 8 + header_bytes] + b" " + data[8 + header_bytes :]
    (tmp_path / "odd.safetensors").write_bytes(odd)
    for path in (tmp_path / "strided.pth", tmp_path / "odd.safetensors"):
        loaded = load_model(path).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_progress_reaches_the_total(tiny_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(tiny_path, dtype=torch.float16, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in _reference(tiny_path).values())
    assert calls == sorted(calls) and calls[-1] == (total, total) and len(calls) > 10


def test_too_little_memory_is_refused_with_the_figures(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "available_bytes", lambda: 5 * MIB)
    with pytest.raises(CheckpointError, match=r"needs 1\d\d MiB of memory, but 5 MiB is available.*--force"):
        load_model(tiny_path, dtype=torch.float16)
    load_model(tiny_path, dtype=torch.float16, force=True)


def test_available_memory_heeds_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_CGROUP_ROOT", tmp_path)
    own = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    group = next((line.split(":", 2)[2] for line in own if line.split(":", 2)[1] == ""), None)
    if group is None:
        pytest.skip("no cgroup v2 entry on this machine")
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{70 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\nactive_file {10 * MIB}\ninactive_file {20 * MIB}\n")
    assert available_bytes() == 60 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 60 * MIB


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = _random_state(family_member("tiny", "pure"), 0)
    state["actions.mlp.2.weight"][1, 2] = value
    path = tmp_path / "a.pth"
    path.write_bytes(saved(state))
    for options in ({"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"check_finite": True}):
        with pytest.raises(CheckpointError, match=r"actions\.mlp\.2\.weight has 1 values that are NaN or Inf"):
            load_model(path, **options)


def test_a_value_too_large_for_fp16_is_named(tmp_path: Path) -> None:
    state = _random_state(family_member("tiny", "pure"), 0)
    state["rnn.weight_hh_l1"][0, 0] = 1e6
    path = tmp_path / "a.pth"
    path.write_bytes(saved(state))
    with pytest.raises(CheckpointError, match=r"rnn\.weight_hh_l1 .* as float16 .*bfloat16"):
        load_model(path, dtype=torch.float16)
    load_model(path, dtype=torch.bfloat16)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    state = _random_state(family_member("tiny", "pure"), 0)
    state["rnn.bias_hh_l0"] = state["rnn.bias_hh_l0"].to(torch.int8)
    (tmp_path / "a.pth").write_bytes(saved(state))
    with pytest.raises(CheckpointError, match=r"rnn\.bias_hh_l0 is int8"):
        open_checkpoint(tmp_path / "a.pth")


def test_a_foreign_file_is_refused_before_any_pickle_runs(tmp_path: Path) -> None:
    make, pattern = BAD_FILES["os.system"]
    (tmp_path / "a.pth").write_bytes(make(b""))
    with pytest.raises(CheckpointError, match=pattern):
        load_model(tmp_path / "a.pth")


def _inspect(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args([str(argument) for argument in arguments]))


def test_inspect_describes_without_torch(tiny_path: Path, tmp_path: Path) -> None:
    program = (
        "import argparse, sys; sys.modules.update(torch=None, transformers=None)\n"
        "from mobile_vla_inference.tools import inspect\n"
        "parser = argparse.ArgumentParser(); inspect.add_arguments(parser)\n"
        "sys.exit(inspect.run(parser.parse_args()))"
    )
    out = tmp_path / "description.json"
    command = [sys.executable, "-c", program, str(tiny_path), "--json", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "hybrid" in result.stdout and "LSTM, 2 layers, 64 to 64" in result.stdout
    described = json.loads(out.read_text(encoding="utf-8"))
    assert described["parameters"] == sum(part["parameters"] for part in described["parts"].values())
    assert described["parameters"] == sum(tensor.numel() for tensor in _reference(tiny_path).values())
    assert described["variant"] == "hybrid" and described["dtype"] == "float32"
    assert described["file_size_bytes"] == tiny_path.stat().st_size
    assert described["val_mae_unit"] == "normalized" and described["assumed"] == []
    assert HybridConfig.from_json(described["config"]) == TINY
    assert [feature["name"] for feature in described["fusion"]["features"]] == ["kosmos_text", "clip_text"]
    assert sum(feature["width"] for feature in described["fusion"]["features"]) == described["fusion"]["input"]
    assert described["dead_weight"]["optimizer"]["bytes"] > 0
    needs = described["needs"]
    assert needs["fp32"]["run_mib"] > needs["fp16"]["run_mib"] > needs["int8"]["run_mib"]
    assert all(need["load_mib"] >= need["run_mib"] for need in needs.values())


def test_inspect_confirms_what_was_assumed(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "alone.pth"
    path.write_bytes(tiny_path.read_bytes())
    assert not load_settings(path).settings.confirmed
    assert _inspect(path) == 0
    assert "assumed, not read: action_axes" in capsys.readouterr().out
    assert not load_settings(path).settings.confirmed
    assert _inspect(path, "--confirm") == 0
    out = capsys.readouterr().out
    assert "step_period_s = 0.3 (was assumed)" in out
    confirmed = load_settings(path).settings
    assert confirmed.confirmed and confirmed.fusion_features == ("kosmos_text", "clip_text")


def test_inspect_of_a_misfit_raises_the_table(tmp_path: Path) -> None:
    state = _random_state(TINY, 0)
    del state["rnn.bias_hh_l1"]
    (tmp_path / "a.pth").write_bytes(saved(state))
    with pytest.raises(CheckpointError, match=r"(?s)1 missing.*rnn\.bias_hh_l1"):
        _inspect(tmp_path / "a.pth", "--json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
