#!/usr/bin/env python
"""``scratch-det analyze model``."""

from scratch_det.commands.analyze_model import main

if __name__ == "__main__":
    main()
