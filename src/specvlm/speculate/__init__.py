"""A model that is sped up: drafters, acceptance, and what to draft next."""
