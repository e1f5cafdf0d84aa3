"""A stand-in for the vendor's package, and what a run that was trained with it did."""
