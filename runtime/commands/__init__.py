"""The commands of ``ftc``: one a file, named after it.

A new command is a file ``<name>.py`` that holds the function ``<name>`` under
:func:`~ftc.runtime.commands.options.command`, and its name in :data:`NAMES`. At
its top a file imports click and what it needs to be declared; everything heavy
is imported within the function, so that ``--help`` answers at once.
"""

NAMES = (
    "compile",
    "inspect",
    "run",
    "eval",
    "bench",
    "train",
    "plan",
    "export",
    "passes",
    "target",
)
"""In the order of the help."""
