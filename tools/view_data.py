#!/usr/bin/env python
"""``scratch-det view data``."""

from scratch_det.commands.view_data import main

if __name__ == "__main__":
    main()
