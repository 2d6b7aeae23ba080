"""Random calls of the public functions, valid and malformed, that look for crashes and for wrong answers."""
