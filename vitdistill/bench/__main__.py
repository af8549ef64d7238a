"""Runs the bench's command line: `python -m vitdistill.bench`."""
import sys

from .bench import main

sys.exit(main())
