"""The command line `ixc2`. It never travels with a checkpoint, so it need not be flat as the root is."""
