#!/usr/bin/env python
"""``scratch-det data voc``."""

from scratch_det.commands.data_voc import main

if __name__ == "__main__":
    main()
