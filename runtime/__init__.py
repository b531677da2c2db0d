"""What a run needs and no equation does: flags, files, checkpoints, processes, generation."""
