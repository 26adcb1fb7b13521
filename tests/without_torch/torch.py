"""In the place of torch, for programs that tests start: their users need none, and tensorboardX imports it for two
seconds where it is."""

raise ImportError("only an oracle of the tests")
