#!/usr/bin/env python
"""``scratch-det pretrain``."""

from scratch_det.commands.pretrain import main

if __name__ == "__main__":
    main()
