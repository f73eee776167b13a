"""PBS's commands in front of Slurm (slurm-wlm-torque): jobs and records are Slurm's own."""

from .slurm import job, parse, recorded

__all__ = ["job", "parse", "recorded"]
