"""The names that come with the bench, so that a wrong one on a command line is answered without torch."""

PEERS = ("transformers-eager", "transformers-static", "transformers-assisted")
PLANTED_DRAFTS = ("published", "hopeless", "changing")  # that a planted smaller model may be
