"""What a run rests on and leaves: recipe, profile, and a record for every row."""

import json
import os
import re
import time

import huggingface_hub
import pytest
import torch
import yaml

import besa
from besa.inputs import models
from besa.machine import files, memory, provenance
from besa.machine.provenance import ROOT
from besa.paper import records, tables
from besa.paper.records import Run, resolve_recipe

CONFIG = {"item": "table1", "model": "llama-7b", "row": "wanda", "profile": "paper", "sparsity": 0.5}


@pytest.fixture
def run(windows, tmp_path):
    run = Run("table1", model="tiny", profile="smoke", recipe={"seq_len": 24, "device": "cpu"}, results=str(tmp_path))
    return run.on(windows, {"text": windows.flatten()}, torch.float32)


def test_a_finished_row_is_read_back_and_another_configuration_is_another_row(run, tiny_llama, windows):
    method = besa.Wanda()
    assert not run.has("wanda", method)
    run.work("wanda", method).mkdir()  # a pruned checkpoint
    saved = run.save("wanda", method, besa.prune(tiny_llama, windows, method, progress=False), {"text": 7.3})
    assert run.has("wanda", method) and run.records({"wanda": method}) == [json.loads(json.dumps(saved))]
    assert saved["sparsity"] == 0.5 and len(saved["projections"]) == 21 and not run.work("wanda", method).exists()
    assert not run.has("wanda", besa.Wanda(sparsity=0.25)) and not run.has("dense", None)
    others = [run.on(windows[:3]), run.on(windows, {"text": windows.flatten()}, torch.bfloat16)]
    others.append(run.on(windows, {"text": windows.flatten()[1:]}, torch.float32))
    assert not any(other.has("wanda", method) for other in others)
    dense = run.save("dense", None, None, {"text": 5.0})
    assert dense["sparsity"] == 0 and dense["config"]["method"] is None and dense["projections"] == []


def test_a_row_is_told_apart_by_what_else_it_depends_on(run, tiny_llama, windows):
    method = besa.Wanda()
    report = besa.prune(tiny_llama, windows, method, progress=False)
    closed = run.apart(reconstruct=besa.Reconstruct().config())
    closed.save("wanda", method, report, {"wiki": 1.0})
    assert closed.has("wanda", method) and not run.has("wanda", method)
    assert not run.apart(reconstruct=None).has("wanda", method)


def test_a_folders_records_are_of_the_weights_that_are_in_it(tiny_llama, tmp_path, monkeypatch):
    def asked():
        return Run("table1", model="./m", profile="smoke", recipe={"device": "cpu"}, results=str(tmp_path / "results"))

    for name in ("here", "there"):
        tiny_llama.save_pretrained(tmp_path / name / "m")
    monkeypatch.chdir(tmp_path / "here")
    asked().save("dense", None, None, {"text": 5.0})
    assert asked().has("dense", None) and len(asked().row_config("dense", None)["checkpoint"]) == 64
    monkeypatch.chdir(tmp_path / "there")
    assert not asked().has("dense", None)
    monkeypatch.chdir(tmp_path / "here")
    before = asked()
    torch.nn.init.zeros_(tiny_llama.lm_head.weight)
    tiny_llama.save_pretrained("m")  # as many bytes
    assert not asked().has("dense", None) and before.has("dense", None)


def test_a_hub_models_records_are_of_the_commit_that_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    run = Run("table1", model="llama-7b", profile="smoke", recipe={"device": "cpu"}, results=str(tmp_path / "results"))
    assert "checkpoint" not in run.row_config("dense", None)  # as in older records
    repository = tmp_path / "cache" / "models--huggyllama--llama-7b"
    (repository / "snapshots" / "0123abc").mkdir(parents=True)
    (repository / "snapshots" / "0123abc" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert run.on(torch.zeros(2, 24, dtype=torch.int64)).row_config("dense", None)["checkpoint"] == "0123abc"


def test_the_embedded_models_records_in_the_repository_are_still_found():
    (path,) = (ROOT / "results" / "reference" / "table1" / "records").glob("smollm2-135m-quick-dense-*.json")
    config = json.loads(path.read_text())["config"]
    recipe = {"device": config["device"], "dtype": config["dtype"].removeprefix("torch.")}
    sums = {name: config[name] for name in ("calibration_sha256", "test_sha256")}
    run = Run("table1", model="smollm2-135m", profile="quick", recipe=recipe).apart(**sums)
    assert run.row_config("dense", None) == config


def test_a_folder_that_is_not_there_has_no_identity():
    assert models.checkpoint_identity("/not/there") is models.checkpoint_identity("./not/there") is None


def test_a_record_names_who_computed(tmp_path):
    folder = records.open_folder("table1", str(tmp_path))
    saved = records.save_record(folder, CONFIG, {})
    assert saved["provenance"]["versions"]["torch"] == torch.__version__
    assert saved["provenance"]["hardware"] and len(saved["provenance"]["commit"]) >= 7


BROKEN = {
    "cut short": lambda record: json.dumps(record)[:100],
    "empty": lambda record: "",
    "no JSON": lambda record: "{]",
    "brackets": lambda record: "[" * 100_000,
    "null": lambda record: "null",
    "a list": lambda record: "[1]",
    "nothing in it": lambda record: "{}",
    "no configuration": lambda record: json.dumps({**record, "config": None}),
    "no provenance": lambda record: json.dumps({**record, "provenance": []}),
    "words for numbers": lambda record: json.dumps({**record, "metrics": {"wiki": "7"}}),
    "no metrics": lambda record: json.dumps({**record, "metrics": [7.3]}),
    "no hash": lambda record: json.dumps({**record, "config_hash": 7}),
    "of another row": lambda record: json.dumps({**record, "config": {**record["config"], "row": "wanda"}}),
    "of another sparsity": lambda record: json.dumps({**record, "config": {**record["config"], "sparsity": 0.6}}),
    "another number": lambda record: json.dumps({**record, "metrics": {"wiki": 7.2}, "sha256": "0" * 64}),
    "no sparsity": lambda record: json.dumps({name: record[name] for name in record if name != "sparsity"}),
    "no threads": lambda record: json.dumps({**record, "provenance": {**record["provenance"], "threads": None}}),
    "no seconds": lambda record: json.dumps({**record, "seconds": {"all": 3}}),
    "a word of a projection": lambda record: json.dumps({**record, "projections": ["q_proj"]}),
    "half a projection": lambda record: json.dumps({**record, "projections": [{"block": 0, "rows": 3}]}),
    "True for a number": lambda record: json.dumps({**record, "metrics": {"wiki": True}}),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_what_is_no_record_of_the_row_counts_as_missing(run, damage):
    saved = run.save("dense", None, None, {"wiki": 7.3})
    assert run.has("dense", None) and run.records({"dense": None})[0]["metrics"] == {"wiki": 7.3}
    (path,) = (run.folder / "records").glob("*.json")
    path.write_text(damage(saved))
    assert not run.has("dense", None)
    with pytest.raises(ValueError, match=rf"row 'dense' has no whole record in {run.folder}; run the cells before"):
        run.records({"dense": None})


def test_a_value_that_was_changed_since_is_found_and_records_without_a_sum_are_read(run):
    saved = run.save("dense", None, None, {"wiki": 7.3})
    (path,) = (run.folder / "records").glob("*.json")
    text = path.read_text()
    assert "sha256" not in saved and files.read_note(path) == json.loads(json.dumps(saved))
    for old, new in (("7.3", "7.8"), ('"seconds": 0.0', '"seconds": 1.0')):
        path.write_text(text.replace(old, new))
        assert not run.has("dense", None)
    with pytest.raises(ValueError, match="its sha256 is not that of its values"):
        path.write_text(text.replace("7.3", "7.8"))
        tables.load_record(path)
    path.write_text(json.dumps(saved))  # as earlier versions wrote it
    assert run.has("dense", None)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_stands_where_a_record_is_to_go_is_named_before_any_work(run, make):
    run.save("dense", None, None, {"wiki": 7.3})
    (path,) = (run.folder / "records").glob("*.json")
    path.unlink()
    make(path)
    with pytest.raises(FileExistsError, match=rf"{path} is no ordinary file, and a record is to go there; remove it"):
        run.has("dense", None)


def test_smoke_runs_never_enter_what_is_tracked(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REFERENCE", tmp_path.resolve())
    folder = records.open_folder("table1", str(tmp_path / "table1"))
    records.save_record(folder, CONFIG, {})
    with pytest.raises(ValueError, match="smoke runs only show that the code runs"):
        records.save_record(folder, CONFIG | {"profile": "smoke"}, {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    files.write_text(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"results folder .*file/x' is not writable"):
        records.open_folder("table1", str(tmp_path / "file" / "x"))


def test_a_caption_says_what_the_numbers_rest_on(run):
    caption = run.caption("Perplexity")
    assert "Profile smoke: 6 windows of 24 tokens of sotu; tested on 6 segments of text." in caption
    assert "SMOKE RUN" in caption


def test_a_recipe_comes_from_the_models_file_and_values_of_it_can_be_changed():
    assert resolve_recipe("llama-65b").d_coef == 50 and resolve_recipe("llama-65b").calibration == "c4"
    changed = resolve_recipe("llama-65b", {"d_coef": 2})
    assert changed.d_coef == 2.0 and isinstance(changed.d_coef, float) and changed.d_coef_layer == 0.5
    assert resolve_recipe("/models/llama-65b") == resolve_recipe("smollm2-135m") == records.Recipe()
    with pytest.raises(ValueError, match="recipe has an unknown key 'd_coeff'; known: calibration, sampler, seed"):
        resolve_recipe("smollm2-135m", {"d_coeff": 2})


@pytest.mark.parametrize("path", sorted((ROOT / "reproduce" / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_in_the_repository_are_known_and_name_no_precision(path):
    params = yaml.safe_load(path.read_text())
    assert params["model"] == path.stem and params["recipe"].keys() <= records.Recipe.__dataclass_fields__.keys()
    assert "dtype" not in params["recipe"] | params
    run = Run("table1", model=path.stem, profile=params.get("profile", "quick"), recipe=params["recipe"])
    published = "llama" in path.stem
    assert (run.n_samples, run.seq_len, run.test_limit) == ((128, 2048, None) if published else (32, 512, 32 * 512))


def test_steps_go_to_the_rows_that_they_belong_to(run):
    assert run.fields("besa-row-wise") == {"d_coef": 5.0} and run.fields("besa-layer-wise") == {"d_coef": 0.5}
    assert run.fields("wanda") == {}


def test_lists_come_from_papermill_as_lists_or_as_text():
    assert records.listed("dense,wanda") == ["dense", "wanda"] and records.listed("row, 8") == ["row", 8]
    assert records.listed(["a", 1]) == ["a", 1] and records.listed(0.5) == [0.5] and records.listed("") == []
    for values in (None, {"a": 1}, [["a"]], [0.5, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="is not a name or a finite number, which lists are of"):
            records.listed(values)


def test_profiles_by_name(monkeypatch):
    monkeypatch.setenv("BESA_PROFILE", "smoke")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert records.resolve_profile("auto", gpu).name == "smoke"
    with pytest.raises(ValueError, match="unknown profile 'fast'; known: auto, smoke, quick, paper"):
        records.resolve_profile("fast", cpu)
    monkeypatch.delenv("BESA_PROFILE")
    assert [records.resolve_profile("auto", device).name for device in (cpu, gpu)] == ["quick", "paper"]


def test_what_a_cpu_computes_beside_a_gpu_is_the_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and whatever else is asked of it fails
    with memory.measure(torch.device("cpu")) as cost:
        (tmp_path / "records").mkdir()
        record = records.save_record(tmp_path, CONFIG | {"device": "cpu"}, {})
    assert cost.peak_bytes > 2**20 and re.search(r"\d+ cores$", record["provenance"]["hardware"])


@pytest.mark.parametrize(
    "flags, name",
    [
        ("sse avx512_bf16 amx_bf16", "Xeon: 4 with AMX, "),
        ("sse avx512_bf16", "Xeon: 4 with AVX-512 BF16, "),
        ("sse amx_bf16x", "Xeon: 4, "),
    ],
)
def test_a_processor_is_named_with_what_multiplies_bfloat16(flags, name, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Xeon: 4\nflags\t\t: {flags}\n\n")
    assert provenance._processor(tmp_path / "cpuinfo") == f"{name}{os.cpu_count()} cores"
    assert provenance._processor(tmp_path / "no").endswith(f", {os.cpu_count()} cores")


def test_memory_is_measured_where_the_system_says_little(monkeypatch):
    monkeypatch.setattr(memory, "_status", lambda field: 0)  # a sandbox such as gVisor
    with memory.measure() as cost, memory.watch_anonymous() as anonymous:
        pass
    assert cost.peak_bytes > 2**20 and anonymous.peak_bytes == 0


def test_measured_peak_covers_what_was_allocated_and_freed():
    with memory.measure() as little:
        pass
    with memory.measure() as much:
        torch.ones(2**27).sum()  # 512 MiB
    with memory.measure() as after:
        pass
    assert much.seconds > 0 and much.peak_bytes - little.peak_bytes > 2**28
    assert much.peak_bytes - after.peak_bytes > 2**28


@pytest.mark.skipif(not memory._status("RssAnon"), reason="this system does not tell anonymous memory from files'")
def test_the_peak_of_anonymous_memory_leaves_out_what_is_mapped_from_files(tmp_path):
    (tmp_path / "mapped").write_bytes(bytes(2**28))
    peaks = []
    for take in (
        lambda: None,
        lambda: torch.ones(2**26),
        lambda: torch.from_file(str(tmp_path / "mapped"), size=2**26),
    ):
        with memory.watch_anonymous() as anonymous:
            taken = take()
            touched = taken is None or taken.sum()  # every page
            time.sleep(0.2)
        peaks.append(anonymous.peak_bytes)
        del taken, touched
    (tmp_path / "mapped").unlink()  # a temporary folder stays for a while
    assert peaks[1] - peaks[0] > 2**27 and abs(peaks[2] - peaks[0]) < 2**26
