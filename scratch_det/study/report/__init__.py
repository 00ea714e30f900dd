"""What came of a study, to look at: from outcomes to tables, figures, one page, and the repository's documents.

write.py      DIR/report/                           documents.py  README.md and docs/ from results/
data.py       results/, with description.py's study.json
formats.py    Markdown, CSV, LaTeX
tables.py     which tables, of cells.py             control.py    a branch beside the same run on its own
figures.py    which figures, drawn by drawings.py, of panels.py
page.py       index.html from page.{html,css,js}    run_page.py   what it shows of a run folder
"""
