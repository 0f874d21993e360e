"""Progress of long commands without a terminal."""

import os
import signal
import threading
from io import StringIO

from tests.latents.processes import exit_statuses, start
from vae3d.progress import Bar, ProgressLines, progress


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


def test_a_forked_process_that_is_killed_while_it_logs_blocks_nobody():
    def die():
        progress([]).get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_statuses([start(die)]) == [-signal.SIGKILL]
    assert progress([]).get_lock().acquire(True, 5.0)
    progress([]).get_lock().release()


def test_a_process_that_is_forked_while_a_thread_logs_can_log():
    held, done = threading.Event(), threading.Event()

    def log():
        with progress([]).get_lock():
            held.set()
            done.wait(60)

    thread = threading.Thread(target=log)
    lock = progress([]).get_lock()
    thread.start()
    held.wait()
    child = start(lambda: Bar.get_lock().acquire(True, 5.0) or os._exit(2))
    assert exit_statuses([child], seconds=20) == [0]
    done.set()
    thread.join()
    assert lock.acquire(True, 5.0)
    lock.release()
