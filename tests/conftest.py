"""Loads tests/fixtures.py where tests run."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # The process that starts pytest-xdist's workers runs no test; without torch it starts them five seconds sooner.
    starts_workers = config.getoption("dist", "no") != "no" and config.getoption("tx", None)
    if not starts_workers:
        config.pluginmanager.import_plugin("tests.fixtures")
