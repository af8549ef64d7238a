"""One rank of a training: `python -m vitdistill.train --config FILE`."""
import sys

from .loop import main

sys.exit(main())
