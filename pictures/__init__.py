"""PNG files: what a run was worth, and what its attention aligns."""
