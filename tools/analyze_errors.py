#!/usr/bin/env python
"""``scratch-det analyze errors``."""

from scratch_det.commands.analyze_errors import main

if __name__ == "__main__":
    main()
