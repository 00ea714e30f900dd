#!/usr/bin/env python
"""``scratch-det view curves``."""

from scratch_det.commands.view_curves import main

if __name__ == "__main__":
    main()
