"""Commands that nothing imports, started from the project folder: python -m tools.compare --help"""
