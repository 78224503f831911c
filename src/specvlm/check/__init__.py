"""Whether it is right, and what it sees."""
