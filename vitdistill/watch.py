"""The names of `vitdistill.study.watch`, and `compare_runs`, at their older place."""
from .study.compare import compare_runs as compare  # noqa: F401
from .study.watch import *  # noqa: F403
