"""`python -m tomexport` is `tomexport`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line; an interrupt while it is still loading leaves no traceback either."""
    try:
        from tomexport.cli import main as run

        return run()
    except KeyboardInterrupt:
        os.write(2, b"interrupted; nothing was left behind\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
