"""Fast paths, each beside the plain torch reference that it must equal."""
