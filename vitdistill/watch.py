"""The names of `vitdistill.study.watch`, at their older place."""
from .study.watch import *  # noqa: F403
