#!/usr/bin/env python
"""``scratch-det predict``."""

from scratch_det.commands.predict import main

if __name__ == "__main__":
    main()
