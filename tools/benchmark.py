#!/usr/bin/env python
"""``scratch-det benchmark``."""

from scratch_det.commands.benchmark import main

if __name__ == "__main__":
    main()
