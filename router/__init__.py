"""Everything that decides where something goes: requests to attention workers, tokens to experts."""
