#!/usr/bin/env python
"""``scratch-det detectron2``."""

from scratch_det.commands.detectron2 import main

if __name__ == "__main__":
    main()
