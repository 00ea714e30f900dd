#!/usr/bin/env python
"""``scratch-det data subsets``."""

from scratch_det.commands.data_subsets import main

if __name__ == "__main__":
    main()
