"""Command-line programs over `rqvae.metrics`, run from a checkout; they know no models and no trainers."""
