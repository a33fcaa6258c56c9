"""What the controller decides: the life of routing tables, rescues, heartbeats, scaling; pure, no I/O."""
