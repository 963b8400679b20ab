"""`python -m peftcli` is `peft`."""

import sys

from peftcli.cli import main

if __name__ == "__main__":
    sys.exit(main())
