#!/usr/bin/env python
"""``scratch-det export``."""

from scratch_det.commands.export import main

if __name__ == "__main__":
    main()
