"""The command line: click, the streams, exit codes; one file for each command."""

import gc

gc.set_threshold(200_000)  # modules and trees are no garbage: the search for it takes long
