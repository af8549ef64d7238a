"""What a user types: where paths start, what --help costs, what a dry run leaves behind."""
import subprocess
import sys

from vitdistill.cli import COMMANDS

HELPS = """
import sys
from vitdistill.cli import COMMANDS, main
for name in sys.argv[1:]:
    try:
        main([name, '--help'])
    except SystemExit as end:
        assert end.code == 0, name
assert not {'torch', 'timm', 'pandas', 'matplotlib'} & sys.modules.keys()
"""


def test_help_needs_no_torch():
    """Every command explains its options without the libraries that take seconds to import."""
    names = [name for name in COMMANDS if name != "predict"]
    done = subprocess.run([sys.executable, "-c", HELPS, *names], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--teacher-size" in done.stdout and "--gpus-per-node" in done.stdout
    assert not [word for word in done.stdout.split() if word.startswith("--") and "_" in word]
