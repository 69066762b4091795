"""The command line `ixc2`. It never ships with a checkpoint, so it need not be flat like the root."""
