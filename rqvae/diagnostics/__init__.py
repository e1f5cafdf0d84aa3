"""Which submodule of a decoder, or which combination, a compiler breaks; and what to leave eager or where to cut."""
