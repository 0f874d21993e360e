"""scripts/benchmarks/gpu.py, on the CPU."""

from __future__ import annotations

import json
import time

import pytest
import torch

from tests import tiny
from tests.training.test_trainer import fresh_accelerate  # noqa: F401

gpu = tiny.load_script("gpu")


def results(tmp_path) -> dict:
    return json.loads((tmp_path / "out.json").read_text())


def start(tmp_path, *arguments: str) -> int:
    return gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), *arguments])


def test_every_part_runs_on_a_cpu(tmp_path, monkeypatch):
    """One or two cases of each, since all of them compile and take minutes."""
    for name, (cases_of, share) in gpu.PARTS.items():
        some = {"runs": slice(1, 3), "copies": slice(4)}.get(name, slice(1))
        monkeypatch.setitem(gpu.PARTS, name, (lambda bench, of=cases_of, some=some: of(bench)[some], share))
    assert start(tmp_path, "--budget", "3000") == 0
    found = results(tmp_path)
    assert found["ok"]
    assert {"device", "processor", "torch", "python"} <= found["environment"].keys()
    assert list(found["parts"]) == ["parity", "streams", "copies", "runs", "decode", "train", "reading"]
    for part in found["parts"].values():
        assert part["budget"] > 0
        assert part["seconds"] > 0
        assert not part["left_out"]
    rows = {name: part["rows"][0] for name, part in found["parts"].items()}
    assert rows["parity"]["fp32_output"] < 1e-4
    assert 1e-4 < rows["parity"]["bf16_output"] < 0.2
    assert rows["streams"]["fp32_output"] < 1e-4
    assert rows["runs"]["difference"] == 0  # of a resume, bit for bit
    assert found["parts"]["runs"]["rows"][1]["waits_per_step"] > 0
    for name in ("decode", "train", "reading"):
        assert rows[name]["frames_per_second"] > 0
    table = (tmp_path / "out.md").read_text()
    assert table.count("\n| ") == 1 + sum(len(part["rows"]) for part in found["parts"].values())


def test_a_case_that_fails_does_not_lose_the_others(tmp_path, monkeypatch):
    def cases(bench):
        return [("bad", lambda: 1 / 0), ("good", lambda: {"frames_per_second": 2.0})]

    def broken(bench):
        raise RuntimeError("no cases")

    monkeypatch.setattr(gpu, "PARTS", {"late": (cases, 0.0), "broken": (broken, 0.5), "last": (cases, 0.5)})
    reports = []
    bench = gpu.Bench(torch.device("cpu"), True, tmp_path)
    report = gpu.measure(bench, list(gpu.PARTS), 300, lambda now: reports.append(json.dumps(now)))
    assert not report["ok"]
    assert report["parts"]["late"]["left_out"] == ["bad", "good"]
    assert "no cases" in report["parts"]["broken"]["error"]
    bad, good = report["parts"]["last"]["rows"]
    assert "ZeroDivisionError" in bad["error"]
    assert good["frames_per_second"] == 2.0
    assert list(json.loads(reports[0])["parts"]) == ["late"]  # written at once
    text = gpu.table(report)
    assert "ZeroDivisionError" in text
    assert "| late | good |" in text


def test_a_case_ends_with_its_time(tmp_path):
    bench = gpu.Bench(torch.device("cpu"), True, tmp_path)
    row = gpu.run_case(bench, lambda: time.sleep(60), 0.1)
    assert "0 s" in row["left_out"]
    assert row["seconds"] < 30
    assert gpu.run_case(bench, lambda: {"fine": 1}, 60)["fine"] == 1


def test_an_error_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"only": (lambda bench: [("bad", lambda: 1 / 0)], 1.0)})
    assert start(tmp_path, "--parts", "only") == 1
    assert "ZeroDivisionError" in results(tmp_path)["parts"]["only"]["rows"][0]["traceback"]
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_result_is_an_error(tmp_path, monkeypatch, precision):
    limits = {key: (-1.0 if key == (precision, "output") else limit) for key, limit in gpu.LIMITS.items()}
    monkeypatch.setattr(gpu, "LIMITS", limits)
    bench = gpu.Bench(torch.device("cpu"), True, tmp_path)
    with pytest.raises(AssertionError, match=f"output in {precision}"):
        gpu.compare(bench, lambda: tiny.model("wan"), 1, 16)


def test_reads_of_values_are_counted(tmp_path):
    bench = gpu.Bench(torch.device("cpu"), True, tmp_path)
    x = torch.ones(3)
    with gpu.count_waits(bench) as waits:
        x.sum().item()
        x.tolist()
        (2 * x).sum()
    assert waits() == 2
