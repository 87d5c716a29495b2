"""One denoising step, and the tables of coefficients that drive it."""
