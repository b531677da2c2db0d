"""What lies on this machine: names → folders and files (hub.py), config.json → the shape of a model (model_config.py),
its weights (weights.py), and the command line, which is a dataclass and is saved as one (config.py).

The bottom of the house: everything may import it, and it imports nothing of the project."""
