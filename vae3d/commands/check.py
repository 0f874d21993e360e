"""The whole check of a training run. Imports torch only for a configuration that is sound but for its model."""

from __future__ import annotations

from omegaconf import DictConfig

from vae3d.config.issues import raise_if_any
from vae3d.config.schema import TrainConfig
from vae3d.config.validate import training_issues

# The dry run needs these.
MODEL_KEYS = ("model", "loss", "teacher", "adversary", "stage.train", "data.frames", "data.height", "data.width")


def check_training(cfg: DictConfig) -> TrainConfig:
    """The configuration as typed objects. Raises ConfigError with every error, those of a dry run included.

    There is no dry run where a key is unknown: the value that was meant is missing elsewhere.
    """
    config, issues = training_issues(cfg)
    if not any(issue.unknown_key or issue.within(MODEL_KEYS) for issue in issues):
        from vae3d.commands import dry_run

        wrong = {issue.key for issue in issues}
        issues += [issue for issue in dry_run.issues(config) if issue.key not in wrong]
    raise_if_any(issues)
    return config
