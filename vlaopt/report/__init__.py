"""The report of an artifact: what it is, what it does, how it came to be. Reads; runs and changes nothing."""
