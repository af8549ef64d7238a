"""Starts several ranks in a process of their own: `python -m vitdistill.launch FOLDER OPTIONS OF TORCHRUN`."""
import sys

from vitdistill.launch.processes import main

sys.exit(main())
