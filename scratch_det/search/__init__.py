"""A grid search over keys of a recipe: each point is a run of tools/train_net.py in its own folder.

Never imports torch.

grid.py      the file of axes, and its points        search.py   what is asked for, and what is refused
trainer.py   one point in a process of its own       board.py    who does what: Optuna's record, and locks
work.py      what a worker does until all is done    report.py   table, best.yaml, recipes; picture.py: search.png
"""
