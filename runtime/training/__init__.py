"""Training: objectives on batches of data, an engine that computes, a loop that resumes exactly.

Four things that know nothing of one another meet in :mod:`.trainer`:

==================  ==========================================================
:mod:`.objectives`  what is learned: from rows to tokens, from outputs to a loss
:mod:`.data`        which rows, in which order: a function of seed, epoch and step
:mod:`.engine`      where it is computed: one process here, many elsewhere
:mod:`.checkpoint`  what a run is at a step, on disk
==================  ==========================================================

Which parameters learn is no business of theirs: it is ``requires_grad``, which
passes set (``freeze``, ``lora``, …) before training.
"""
