"""`python -m ralf` is the command `ralf`."""

import sys

from ralf.worker.cli.main import main

sys.exit(main())
