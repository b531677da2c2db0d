"""Commands that nothing imports, started from the project's folder: python -m tools.compare --help"""
