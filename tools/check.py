#!/usr/bin/env python
"""``scratch-det check``."""

from scratch_det.commands.check import main

if __name__ == "__main__":
    main()
