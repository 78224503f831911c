"""How the bundled pair was made: a small rendered world, two small models, their training and their measure."""
