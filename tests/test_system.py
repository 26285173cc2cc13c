"""Device, precision, determinism, cost and atomic files."""

import pytest
import torch

from besa.data.files import atomic_write, cache_folder, sha256, tensor_sha256, write_json
from besa.system import (
    deterministic,
    finite_hint,
    joined,
    measure,
    n_ranks,
    rank,
    repeatable,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")


def test_devices_are_resolved_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for name in ("cuda", "cuda:1", "meta"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be used .* take 'cpu'"):
            resolve_device(name)


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda:3") == taken[0]
    assert resolve_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("units, wanted", [({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)])
def test_the_default_precision_is_the_fast_one(monkeypatch, units, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert resolve_dtype(None, CPU) == wanted
    assert resolve_dtype("float16", CPU) == resolve_dtype(torch.float16, CPU) == torch.float16
    with pytest.raises(ValueError, match="'float64' is not one of"):
        resolve_dtype("float64", CPU)
    assert "float32" in finite_hint(torch.bfloat16) and "float32" not in finite_hint(torch.float32)


def settings():
    matmul = torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"), matmul


def test_results_do_not_depend_on_global_settings_which_are_restored():
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected, before = a @ a, settings()
    torch.set_default_dtype(torch.float64)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            changed = settings()
            with repeatable(CPU):
                assert torch.equal(a @ a, expected) and torch.zeros(1).dtype == torch.float32
                assert torch.zeros(1).device == CPU
            assert settings() == changed
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.mkldnn.matmul.fp32_precision = before[-1]


def test_deterministic_algorithms_are_chosen_for_a_while():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_process_is_rank_0_and_processes_that_are_not_joined_are_refused(monkeypatch):
    with joined():
        assert (rank(), n_ranks()) == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="join them first"):
        n_ranks()


def test_cost_is_measured():
    with measure() as cost:
        torch.ones(2**26)  # 256 MiB
    assert cost.seconds > 0 and cost.peak_bytes > 2**28


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n "a": 1\n}\n' and [*tmp_path.iterdir()] == [path]
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.unlink()  # as safetensors: a new file that only its user may read
        temporary.touch(0o600)
    other = tmp_path / "b"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_sums_and_the_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert tensor_sha256(torch.tensor([97, 98, 99], dtype=torch.uint8)) == sha256(tmp_path / "a")
    assert tensor_sha256(torch.ones(2, dtype=torch.bfloat16)) != tensor_sha256(torch.zeros(2, dtype=torch.bfloat16))
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
