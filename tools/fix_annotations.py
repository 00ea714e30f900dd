#!/usr/bin/env python
"""``scratch-det data fix``."""

from scratch_det.commands.data_fix import main

if __name__ == "__main__":
    main()
