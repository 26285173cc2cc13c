import json

import pytest
import torch

from besa.machine import files, memory
from besa.paper import results

CONFIG = {"item": "table1", "model": "llama-7b", "row": "wanda", "profile": "paper", "sparsity": 0.5}
OUTCOME = {"metrics": {"wikitext2": 7.3, "c4": 9.0, "ptb": 80.14}, "sparsity": 0.5, "seconds": 3.0, "peak_bytes": 2**30}


def test_a_record_is_found_by_exactly_its_configuration(tmp_path):
    folder = results.open_folder("table1", str(tmp_path))
    assert results.find_record(folder, CONFIG) is None
    saved = results.save_record(folder, CONFIG, OUTCOME)
    assert results.find_record(folder, CONFIG) == json.loads(json.dumps(saved))
    assert results.find_record(folder, CONFIG | {"sparsity": 0.6}) is None
    assert saved["provenance"]["versions"]["torch"] == torch.__version__
    assert saved["provenance"]["hardware"] and len(saved["provenance"]["commit"]) >= 7


def test_a_broken_record_counts_as_missing(tmp_path):
    folder = results.open_folder("table1", str(tmp_path))
    results.save_record(folder, CONFIG, OUTCOME)
    (path,) = (folder / "records").glob("*.json")
    path.write_text(path.read_text()[:100])
    assert results.find_record(folder, CONFIG) is None


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
        results.open_folder("table1", str(tmp_path / "file" / "x"))


def test_comparison_finds_the_published_value_and_judges_within_two_percent(tmp_path):
    folder = results.open_folder("table1", str(tmp_path))
    frame = results.compare([results.save_record(folder, CONFIG, OUTCOME)], "table1").set_index("text")
    assert frame.loc["wikitext2", "published"] == 7.26 and frame.loc["wikitext2", "verdict"] == "reproduced"
    assert frame.loc["c4", "verdict"] == "better"
    assert frame.loc["wikitext2", "difference"] == "+0.6%"
    assert frame["source"].str.startswith("Xu et al. 2024").all()


def test_comparison_judges_accuracies_by_the_higher_one_and_only_on_all_questions(tmp_path):
    folder = results.open_folder("table2", str(tmp_path))
    config = CONFIG | {"item": "table2", "row": "besa-row-wise", "limit": None}
    outcome = OUTCOME | {"metrics": {"piqa": 79.0, "boolq": 70.0, "average": 63.0}}  # published: 76.66, 72.17, 63.13
    frame = results.compare([results.save_record(folder, config, outcome)], "table2", "accuracy_percent").set_index(
        "text"
    )
    assert dict(frame["verdict"]) == {"piqa": "better", "boolq": "worse", "average": "reproduced"}
    part = results.save_record(folder, config | {"limit": 100}, outcome)
    assert set(results.compare([part], "table2", "accuracy_percent")["verdict"]) == {"not judged: other protocol"}


def test_runs_of_another_protocol_are_not_judged(tmp_path):
    folder = results.open_folder("table1", str(tmp_path))
    quick = results.save_record(folder, CONFIG | {"profile": "quick"}, OUTCOME)
    assert set(results.compare([quick], "table1")["verdict"]) == {"not judged: other protocol"}
    other = results.save_record(folder, CONFIG | {"model": "smollm2-135m"}, OUTCOME)
    assert results.compare([other], "table1").empty


def test_comparison_takes_the_values_of_the_named_metric(tmp_path):
    folder = results.open_folder("table4", str(tmp_path))
    config = CONFIG | {"item": "table4", "row": "besa-row-wise"}
    record = results.save_record(folder, config, OUTCOME | {"metrics": {"q_proj": 2232.31, "down_proj": 7200.0}})
    frame = results.compare([record], "table4", "cycles").set_index("text")  # beside sparsity and speed-up of q_proj
    assert frame["published"].to_dict() == {"q_proj": 2232.31, "down_proj": 6850.03}
    assert frame["verdict"].to_dict() == {"q_proj": "reproduced", "down_proj": "worse"}


def test_tables_round_as_the_paper_does_and_keep_the_digits_in_the_csv(tmp_path):
    folder = results.open_folder("table1", str(tmp_path))
    table = results.summary([results.save_record(folder, CONFIG, OUTCOME | {"sparsity": 0.49663})])
    markdown = results.write_table(table, folder, "t", "Caption 50 %")
    assert "| wanda" in markdown and "0.4966" in markdown and "7.30" in markdown
    assert "0.49663" in (folder / "t.csv").read_text()
    assert r"Caption 50 \%" in (folder / "t.tex").read_text()


def test_profiles_by_name(monkeypatch):
    monkeypatch.setenv("BESA_PROFILE", "smoke")
    assert results.resolve_profile("auto").name == "smoke"
    with pytest.raises(ValueError, match="unknown profile 'fast'; known: auto, smoke, quick, paper"):
        results.resolve_profile("fast")


def test_measured_peak_covers_what_was_allocated_and_freed():
    with memory.measure() as little:
        pass
    with memory.measure() as much:
        torch.ones(2**27).sum()  # 512 MiB
    with memory.measure() as after:
        pass
    assert much.seconds > 0 and much.peak_bytes - little.peak_bytes > 2**28
    assert much.peak_bytes - after.peak_bytes > 2**28


def test_citation_names_commit_hardware_and_profile(tmp_path):
    folder = results.open_folder("table1", str(tmp_path))
    record = results.save_record(folder, CONFIG, OUTCOME)
    text = results.citation([record])
    for part in ("xu2024besa", record["provenance"]["commit"][:12], record["provenance"]["hardware"], "profile paper"):
        assert part in text
