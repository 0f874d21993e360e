"""scripts/benchmarks/bench_networks.py, with tiny networks."""

from __future__ import annotations

import json

import pytest
import torch

from tests import tiny

bench_networks = tiny.load_script("bench_networks")
LINES = (
    "Wan2.1 d32 encode 17x128^2",
    "SD f8c4 train 256^2",
    "TAEHV w2_2 decode 17x256^2",
    "joining 1e6 paths to a folder",
    "table of 1e6 rows, first time",
    "table of 1e6 rows, again",
)


@pytest.fixture
def bench(tmp_path):
    return bench_networks.Bench(quick=True, pairs=1, taehv=None, opensora=None, folder=tmp_path)


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("# Speed\n\n<!-- networks -->\nstale\n<!-- /networks -->\n\nMore\n")
    return file


def start(tmp_path, monkeypatch, lines, *arguments) -> int:
    monkeypatch.setattr(bench_networks, "LINES", {name: bench_networks.LINES[name] for name in lines})
    return bench_networks.main(["--quick", "--out", str(tmp_path / "out.json"), *map(str, arguments)])


def test_lines_have_ours_the_peer_and_the_limit(tmp_path, monkeypatch, page):
    assert start(tmp_path, monkeypatch, LINES, "--page", page) == 0
    [run] = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert {"date", "processor", "torch", "diffusers", "command", "gflops"} <= run.keys()
    wan, sd, taehv, paths, first, again = (run["rows"][name] for name in LINES)
    for row in (wan, sd):
        assert row["peer"] == "diffusers"
        assert row["difference"] < 1e-5
        assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
        assert row["limit_seconds"] == pytest.approx(row["flops"] / run["gflops"] / 1e9)
        assert row["share"] == pytest.approx(row["limit_seconds"] / row["seconds"])
        assert row["memory_mib"] > 0
    assert wan["flops"] < wan["peer_flops"]  # of zeros in front of a clip
    assert sd["flops"] == sd["peer_flops"]
    assert taehv["peer"] is None
    assert taehv["share"] > 0
    assert paths["ratio"] > 0
    assert first["share"] == pytest.approx(first["limit_seconds"] / first["seconds"])
    assert again["seconds"] > 0
    text = page.read_text()
    assert text.startswith("# Speed\n\n<!-- networks -->\n")
    assert text.endswith("<!-- /networks -->\n\nMore\n")
    assert "stale" not in text
    assert all(f"\n| {name}" in text for name in LINES)


def test_earlier_runs_stand_beside_the_new_one(tmp_path, monkeypatch, page, capsys):
    line = "SD f8c4 encode 256^2"
    earlier = {"date": "2020-01-02", "rows": {line: {"ratio": 1.25, "share": 0.333}}}
    (tmp_path / "out.json").write_text(json.dumps({"runs": [earlier]}))
    assert start(tmp_path, monkeypatch, [line]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0] == earlier
    printed = capsys.readouterr().out
    assert "| 2020-01-02: times as fast; % |" in printed
    assert "| 1.25; 33 |" in printed


def test_a_line_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    broken = {"broken": lambda bench: 1 / 0, "good": lambda bench: {"peer": None, "seconds": 2.0}}
    monkeypatch.setattr(bench_networks, "LINES", broken)
    assert start(tmp_path, monkeypatch, broken) == 1
    [run] = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert "ZeroDivisionError" in run["rows"]["broken"]["error"]
    assert run["rows"]["good"]["seconds"] == 2.0
    assert "error: failed: broken" in capsys.readouterr().err


def test_other_results_than_the_peers_are_an_error(bench):
    build = bench_networks.CASES["SD f8c4 decode 256^2"].build

    def wrong(bench):
        networks = build(bench)
        with torch.no_grad():
            networks.ours.network.module.decoder.conv_out.weight.mul_(1.01)
        return networks

    with pytest.raises(AssertionError, match=r"more than 0\.0001"):
        bench_networks.network(bench, bench_networks.Case(wrong, "diffusers", "decode", 1, 256))


def test_a_pattern_without_lines_and_a_page_without_marks_are_errors(tmp_path, page):
    with pytest.raises(SystemExit):
        bench_networks.main(["--only", "nothing", "--out", str(tmp_path / "out.json")])
    page.write_text("<!-- networks -->")
    with pytest.raises(bench_networks.UserError, match="<!-- /networks -->"):
        bench_networks.main(["--page", str(page), "--out", str(tmp_path / "out.json")])
