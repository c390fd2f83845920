"""Train a recipe file: the same as `itpn train`, under the name of the original command line."""

import sys

from itpn.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
