"""Training. Read trainer.py first: `fit` is a run, `train_step` a step.

vae_trainer.py, diffusion_trainer.py: what each kind of model computes, validates and exports.
strategy.py, deepspeed.py: how ranks share a step. step_status.py, failures.py: when a step is skipped or a run stops.
checkpointer.py: what is saved, and when. preflight.py: the first step's errors before the first step.
"""
