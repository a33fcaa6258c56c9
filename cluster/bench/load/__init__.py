"""`moray bench load`: requests that arrive as those of users do, and what users would see of them."""
