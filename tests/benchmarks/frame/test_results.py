import json

from benchmarks.frame.results import write_json


def test_file_names_the_measurement_its_settings_and_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/link.py", "--hosts", "2"])
    write_json(tmp_path / "file.json", "link", {"hosts": 2, "json": tmp_path}, [{"loss": 1.5}])
    content = json.loads((tmp_path / "file.json").read_text())
    assert content["benchmark"] == "link"
    assert content["command"][1:] == ["-m", "benchmarks.link", "--hosts", "2"]
    assert content["arguments"] == {"hosts": 2, "json": str(tmp_path)}
    assert content["rows"] == [{"loss": 1.5}]
    assert content["machine"]["cpu_count"] >= content["machine"]["cpus_usable"] >= 1
    assert content["machine"]["cpu"]
    assert all(content["machine"]["versions"][name] for name in ("torch", "lightning", "lightning_adpsgd"))
