"""References whose keys and values a transformer caches: a file per model, one line to install them, and a bank."""
