#!/usr/bin/env python
"""``scratch-det search``."""

from scratch_det.commands.search import main

if __name__ == "__main__":
    main()
