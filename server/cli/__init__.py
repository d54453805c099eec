"""The command line `giva`: one file for each noun; commands answer with a `Report`, `result` shows it."""
