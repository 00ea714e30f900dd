#!/usr/bin/env python
"""``scratch-det view results``."""

from scratch_det.commands.view_results import main

if __name__ == "__main__":
    main()
