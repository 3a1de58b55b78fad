"""``python -m pyroem`` is the command ``pyroem``."""

import sys

from pyroem.cli import main

sys.exit(main())
