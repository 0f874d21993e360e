"""Training. Read trainer.py first: `fit` is a run, `train_step` a step.

vae_trainer.py, diffusion_trainer.py: what each kind of model computes, validates and exports. student.py: the forward
pass of an autoencoder's step. vae_validation.py: scores of held-out clips.
teacher.py, teacher_cache.py: Distillation, and a folder of a teacher's targets. linear_code.py: what a shortcut starts
from. proximal.py, ema.py, freeze.py: regularisation, averages, and which weights train.
strategy.py, deepspeed.py: how ranks share a step.
step_status.py: metrics of a step, and whether it is applied. failures.py: when failures stop a run.
memory.py: running out of it. checkpointer.py: what is saved, and when. best.py: the best validation score.
preflight.py: the first step's errors before the first step.
runlog.py: files of a run's log, and stop signals. loggers.py: TensorBoard and others.
"""
