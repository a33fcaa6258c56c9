"""What moray-nano learns from: made by these generators from a seed, no outside text."""
