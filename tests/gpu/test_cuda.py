"""Every check of `checks.py` on the GPU that is here: `pytest -m cuda`. Without one they are skipped.

`make gpu` runs the same functions, on a GPU or on the CPU.
"""
import pytest
import torch

from checks import CHECKS, check_resume

without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
pytestmark = [pytest.mark.cuda, without_gpu]


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name, tmp_path):
    """As its docstring says."""
    print(f"{name}: {CHECKS[name]('cuda', tmp_path)}")


@pytest.mark.parametrize("mode", ["none", "default", "reduce-overhead"])
def test_deterministic_runs_resume_to_the_byte(mode, tmp_path):
    """Killed and started again, the weights are those of a run left alone."""
    print(check_resume("cuda", tmp_path, mode=mode, deterministic=True))
