"""What test_all.py does not show a reader: files, runs, processes, tools."""
