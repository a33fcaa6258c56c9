"""The trainer of moray-nano, the small model in the box."""
