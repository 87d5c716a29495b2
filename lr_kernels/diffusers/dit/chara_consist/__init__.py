"""CharaConsist (arXiv 2507.11533): one character in many pictures of Flux."""
