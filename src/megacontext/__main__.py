"""``python -m megacontext``."""

import sys

from megacontext.cli.main import main

sys.exit(main())
