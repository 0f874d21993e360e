"""Means, intervals and comparisons by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vae3d.evaluation.pairs import PairInfo, Protocol
from vae3d.evaluation.store import VideoScore
from vae3d.evaluation.summary import compare, direction, interval, summarize
from vae3d.evaluation.tables import comparison_table, metric_table, set_table
from vae3d.metrics import MetricError, Score, build_metrics
from vae3d.report import text_table


def video(name: str, value: float | None, frames: int = 4) -> VideoScore:
    info = PairInfo(frames, 16, 16, 24.0, ("h264/gbrp", "h264/gbrp"), lossy=False)
    series = [] if value is None else [value] * frames
    return VideoScore(name, info, {"ssim": Score(value, series)}, {}, {})


def test_interval_is_student_s_t():
    """By hand: 12.706 is t of one degree of freedom, 2.776 of four."""
    assert interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    half = 2.776 * np.sqrt(2.5 / 5)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - half, 3 + half), abs=1e-3)


@pytest.mark.parametrize("videos", [2, 3, 8])
def test_equal_models_are_called_different_once_in_twenty(videos):
    draws = np.random.default_rng(0).normal(size=(2000, videos))
    marked = np.mean([low > 0 or high < 0 for low, high in map(interval, draws)])
    assert marked == pytest.approx(0.05, abs=0.015)


def test_one_video_has_no_interval():
    assert interval([1.0]) == (None, None)


def test_long_videos_weigh_as_much_as_short_ones():
    told = summarize([video("a", 0.5, frames=1), video("b", 1.0, frames=9)], build_metrics(["ssim"]), Protocol())
    figures = told["metrics"]["ssim"]
    assert figures["mean"] == figures["video_mean"] == figures["median"] == 0.75
    assert figures["frame_mean"] == pytest.approx(0.95)
    assert figures["higher_is_better"] is True


def test_videos_without_a_value_are_left_out_and_counted():
    told = summarize([video("a", 0.5), video("b", None)], build_metrics(["ssim"]), Protocol())
    assert (told["metrics"]["ssim"]["mean"], told["metrics"]["ssim"]["undefined"]) == (0.5, 1)
    nothing = summarize([video("b", None)], build_metrics(["ssim"]), Protocol())["metrics"]["ssim"]
    assert nothing == {"mean": None, "undefined": 1, "higher_is_better": True}


def test_differences_are_paired_by_video():
    first = [video("a", 0.5), video("b", 0.9), video("c", None)]
    second = [video("a", 0.6), video("b", 0.8), video("c", 0.7)]
    (row,) = compare({"x": first, "y": second}, {"ssim": True})
    assert row["difference"] == pytest.approx(0.0)
    assert (row["better_on"], row["videos"], row["name"], row["against"]) == (1, 2, "y", "x")
    (lower,) = compare({"x": first, "y": second}, {"ssim": False})
    assert lower["better_on"] == 1
    (common,) = compare({"x": first, "y": second[1:]}, {"ssim": True})
    assert (common["difference"], common["videos"]) == (pytest.approx(-0.1), 1)
    with pytest.raises(MetricError, match="y and x have no video in common"):
        compare({"x": first[:1], "y": second[1:]}, {"ssim": True})


def test_a_ratio_is_best_at_1_in_comparisons_summaries_reports_and_best_checkpoints():
    from vae3d.commands.closing import score_rows
    from vae3d.evaluation.page import Row, page_metrics, ranking
    from vae3d.training.best import BestExport

    def ratio(name: str, *frames: float) -> VideoScore:
        scores = {"seam_ratio": Score(float(np.mean(frames)), list(frames))}
        return VideoScore(name, video(name, 1.0, len(frames)).info, scores, {}, {})

    columns = build_metrics(["seam"]).columns
    below, near, above = ratio("a", 0.2, 0.6, 0.3), ratio("b", 1.1, 0.95, 1.0), ratio("c", 3.0, 1.5, 1.0)
    (row,) = compare(
        {"x": [below, above], "y": [ratio("a", 1.2), ratio("c", 0.3)]}, {"seam_ratio": columns["seam_ratio"]}
    )
    assert row["better_on"] == 2
    rows = [Row(v.name, v.name, scores={"rec": v}) for v in (near, above, below)]
    by, order = ranking(rows, {"seam_ratio": columns["seam_ratio"]})
    assert (by, [row.name for row in order]) == ("seam_ratio", ["c", "a", "b"])
    assert page_metrics(columns)["seam_ratio"].better == 1.0
    figures = {"seam_ratio": {"mean": 1.0, **direction(columns["seam_ratio"])}}
    assert figures["seam_ratio"] | {"mean": 0} == {"mean": 0, "higher_is_better": None, "best_at": 1.0}
    _, rows = metric_table({"metrics": figures, "videos": 3, "preset": {"average": "videos"}})
    assert rows[0][0] == "seam_ratio → 1"
    best, kept = BestExport("seam_ratio", columns), []
    for value in (3.0, 0.2, 0.9, 0.5, 1.05, float("nan")):
        if best.beaten_by(value):
            best.value = value
            kept.append(value)
    assert kept == [3.0, 0.2, 0.9, 1.05]
    validations = [{"step": step, "val/seam_ratio": value} for step, value in enumerate((3.0, 0.2, 0.9, 0.5))]
    assert score_rows(validations, columns) == [["seam_ratio", "3", "0.9", "2", "0.5"]]


def test_differences_that_are_sure_are_marked():
    first = [video(str(i), 0.5 + 0.01 * (i % 3)) for i in range(12)]
    second = [video(str(i), 0.6 + 0.01 * (i % 5)) for i in range(12)]
    text = comparison_table(compare({"x": first, "y": second}, {"ssim": True}))
    assert "+0.1075*" in text
    assert "12 of 12" in text
    assert "+0.0000 " in comparison_table(compare({"x": first, "y": first}, {"ssim": True}))
    near = [video(v.name, v.scores["ssim"].value + 3e-5 + 2e-6 * (i % 2)) for i, v in enumerate(first)]
    assert "+0.000031*" in comparison_table(compare({"x": first, "y": near}, {"ssim": True}))  # not +0.0000*


def test_a_table_of_many_videos_is_cut_and_says_so():
    videos = [video(f"v{i:02}", 0.5) for i in range(30)]
    text = set_table(summarize(videos, build_metrics(["ssim"]), Protocol()))
    assert "v19" in text
    assert "v20" not in text
    assert "... 10 more in per_video.csv" in text


def test_an_interval_over_videos_is_not_shown_as_one_of_a_mean_over_frames():
    told = summarize([video("a", 0.5, 1), video("b", 0.6, 99)], build_metrics(["ssim"]), Protocol(), "vidtok")
    assert told["metrics"]["ssim"]["mean"] == pytest.approx(0.599)
    low, high = told["metrics"]["ssim"]["ci95"]
    assert (low + high) / 2 == pytest.approx(0.55)
    assert f"95 % interval over videos          {low:.4f} to {high:.4f}" in set_table(told)
    assert metric_table(told)[0][2] == "95 % interval over videos"


def test_columns_line_up():
    text = text_table(["name", "x"], [["a", "1.0000"], None, ["long name", "-"]])
    assert text.splitlines() == [
        "name            x",
        "-----------------",
        "a          1.0000",
        "-----------------",
        "long name       -",
    ]


def test_a_name_in_a_table_does_not_reach_the_terminal_as_an_escape_sequence():
    assert text_table(["name"], [["\x1b[2Ja\nb\x07"]]).splitlines()[2:] == [r"\x1b[2Ja\nb\x07"]
    assert text_table(["\x1b[2Ja"], []).splitlines()[0] == r"\x1b[2Ja"
