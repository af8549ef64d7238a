"""One rank of a training: `python -m vitdistill.train --config FILE`. It starts the table of tasks, which stands above."""
import importlib
import sys

sys.exit(importlib.import_module("vitdistill.tasks.table").main())
