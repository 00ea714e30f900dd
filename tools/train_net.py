#!/usr/bin/env python
"""``scratch-det train``."""

from scratch_det.commands.train import main

if __name__ == "__main__":
    main()
