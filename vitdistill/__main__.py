"""Runs the command line: `python -m vitdistill`."""
import sys

from .cli import main

sys.exit(main())
