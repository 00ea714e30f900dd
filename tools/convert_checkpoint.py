#!/usr/bin/env python
"""``scratch-det convert``."""

from scratch_det.commands.convert import main

if __name__ == "__main__":
    main()
