#!/usr/bin/env python
"""``scratch-det study``."""

from scratch_det.commands.study import main

if __name__ == "__main__":
    main()
