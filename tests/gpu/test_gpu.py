"""What only a GPU can show, of tiny networks: the checks of scripts/benchmarks/gpu.py, one test per case."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.training.test_trainer import fresh_accelerate  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
gpu = tiny.load_script("gpu")
DEVICE = torch.device("cuda")


def bench(folder: Path) -> object:
    return gpu.Bench(DEVICE, True, folder)


@pytest.mark.parametrize("name", [name for name, _ in gpu.parity(bench(Path()))])
def test_a_model_computes_the_same_as_on_the_cpu(tmp_path, name):
    dict(gpu.parity(bench(tmp_path)))[name]()


@pytest.mark.parametrize("name", [name for name, _ in gpu.streams(bench(Path()))])
def test_a_stream_gives_what_the_whole_clip_gives(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gpu.compiled, "BACKEND", "eager")
    dict(gpu.streams(bench(tmp_path)))[name]()


@pytest.mark.parametrize("name", [name for name, _ in gpu.copies(bench(Path()))])
def test_copies_beside_the_computation_give_the_same_bits(tmp_path, name):
    dict(gpu.copies(gpu.Bench(DEVICE, False, tmp_path)))[name]()  # of real size, so that copies and kernels overlap


@pytest.mark.parametrize("name", [name for name, _ in gpu.runs(bench(Path()))])
def test_a_run_trains_and_resumes(tmp_path, name):
    dict(gpu.runs(bench(tmp_path)))[name]()
