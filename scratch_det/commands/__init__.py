"""What the commands of ``scratch-det`` read from their command lines; tools/ has them as scripts.

A module has the help as its docstring, ``build_parser``, and ``main``, which ends the process by SystemExit.
"""
