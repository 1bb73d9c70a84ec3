"""``python -m fastreg``: the same as the ``fastreg`` command."""

from __future__ import annotations

import sys

from fastreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
