#!/usr/bin/env python
"""``scratch-det config``."""

from scratch_det.commands.config import main

if __name__ == "__main__":
    main()
