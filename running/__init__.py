"""What a run needs and no equation does: its settings and folder, loading, batches, caches, checkpoints, processes,
reports.

May import files/, the concepts (model.py, tokenize_align.py, cma.py, discriminator.py, toy.py) and methods/; the
scripts on top and tools/ import it."""
