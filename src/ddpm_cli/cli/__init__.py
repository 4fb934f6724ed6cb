"""The command line: parses, calls the core, renders. Everything that prints is in here."""
