#!/usr/bin/env python
"""``scratch-det data digits``."""

from scratch_det.commands.data_digits import main

if __name__ == "__main__":
    main()
