"""Progress of long commands without a terminal."""

from io import StringIO

from vae3d.progress import ProgressLines, progress


def test_without_a_terminal_progress_is_whole_lines():
    log = StringIO()
    assert list(ProgressLines([1, 2], seconds=0, file=log, unit="clip", desc="encode")) == [1, 2]
    lines = [line for line in log.getvalue().replace("\r", "").split("\n") if line]
    assert len(lines) >= 2
    assert all(line.startswith("encode:") for line in lines)
    assert any("1/2" in line and "clip" in line for line in lines)


def test_without_a_terminal_a_short_command_prints_no_progress(capsys):
    assert list(progress([1, 2], unit="clip")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_hidden_progress_prints_nothing():
    log = StringIO()
    assert list(progress([1, 2], hidden=True, file=log)) == [1, 2]
    assert log.getvalue() == ""
