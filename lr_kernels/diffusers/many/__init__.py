"""Many images over many processes: items, their files, and the command that makes them."""
