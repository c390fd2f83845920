"""`python -m itpn`."""

import sys

from itpn.cli import main

sys.exit(main())
