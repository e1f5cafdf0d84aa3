"""JSON in, pages out."""
